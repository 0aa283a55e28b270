// What every operator asks of the tensors it is given. Python has checked the arguments and named the wrong one
// already; these checks keep a direct call of the raw operator from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shape(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, ": expected ", shape.size(),
                  " dimensions, got ", tensor.dim());
  for (size_t i = 0; i < shape.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == shape[i], name, ": expected size ", shape[i], " in dimension ", i, ", got ",
                    tensor.size(i));
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " and ", other_name, " differ in dtype");
  STD_TORCH_CHECK(tensor.device() == other.device(), name, " and ", other_name, " are on different devices");
}
