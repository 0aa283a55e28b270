// pyramid_pool's operators, as the libraries register them.
#pragma once

#include "../common/tensor.h"

void pyramid_pool(const Tensor& x, const std::vector<int64_t>& scales, const Tensor& out);
void pyramid_pool_backward(const Tensor& grad, const std::vector<int64_t>& scales, const Tensor& grad_x);
