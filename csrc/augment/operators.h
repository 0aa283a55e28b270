// augment's operator, as the CPU library registers it.
#pragma once

#include <vector>

#include "../common/tensor.h"

// kinds, values: of the steps; mean, std: three numbers each, or none where `out` is uint8.
void augment(const Tensor& image, const std::vector<int64_t>& size, const std::vector<int64_t>& window, bool flip,
             const std::vector<int64_t>& kinds, const std::vector<double>& values, const std::vector<double>& mean,
             const std::vector<double>& std, const Tensor& out);
