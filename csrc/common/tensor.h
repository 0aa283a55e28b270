// What every operator asks of the tensors it is given. Python has checked the arguments and named the wrong one
// already; these checks keep a direct call of the raw operator from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

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

// A contiguous tensor beside the map, in the type that sums are kept in, or in float64 where that is said.
inline void check_small(const Tensor& tensor, const char* name, const Tensor& x, const std::vector<int64_t>& shape,
                        bool wide = false) {
  check_shape(tensor, name, shape);
  const bool is_double = wide || x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(tensor.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float), name, ": expected ",
                  is_double ? "float64" : "float32");
  STD_TORCH_CHECK(tensor.device() == x.device(), name, " and x are on different devices");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_small(const MaybeTensor& tensor, const char* name, const Tensor& x,
                        const std::vector<int64_t>& shape) {
  if (tensor) check_small(*tensor, name, x, shape);
}

inline void check_layout(const Tensor& map, const char* name) {
  STD_TORCH_CHECK(map.stride(3) == 1 || map.size(3) == 1 || map.stride(1) == 1 || map.size(1) == 1, name,
                  ": expected columns or channels to lie side by side in memory");
}
