// What every raw operator is registered with, and what it asks of the tensors it is given.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;
using Scales = std::vector<int64_t>;

// An operator's schema stands beside what runs it, in one list for both libraries.
struct Operator {
  const char* schema;
  void (*run)(StableIValue*, uint64_t, uint64_t);  // TORCH_BOX(&function)

  std::string name() const { return std::string(schema, std::strcspn(schema, "(")); }
};

#define APC_REGISTER(NAMESPACE, DEVICE, OPERATORS)                                      \
  STABLE_TORCH_LIBRARY_FRAGMENT(NAMESPACE, library) {                                   \
    for (const Operator& each : OPERATORS) library.def(each.schema);                    \
  }                                                                                     \
  STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, DEVICE, library) {                               \
    for (const Operator& each : OPERATORS) library.impl(each.name().c_str(), each.run); \
  }

// Python has checked the arguments and named the wrong one already; these checks keep a direct call of the raw operator
// from reading or writing out of bounds.

inline void check_dimensions(const Tensor& tensor, const char* name, int64_t count) {
  STD_TORCH_CHECK(tensor.dim() == count, name, ": expected ", count, " dimensions, got ", tensor.dim());
}

inline void check_shape(const Tensor& tensor, const char* name, const Shape& shape) {
  check_dimensions(tensor, name, static_cast<int64_t>(shape.size()));
  for (size_t i = 0; i < shape.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == shape[i], name, ": expected size ", shape[i], " in dimension ", i, ", got ",
                    tensor.size(i));
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(tensor.device() == other.device(), name, " and ", other_name, " are on different devices");
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_layout(const Tensor& map, const char* name) {
  STD_TORCH_CHECK(map.stride(3) == 1 || map.size(3) == 1 || map.stride(1) == 1 || map.size(1) == 1, name,
                  ": expected columns or channels to lie side by side in memory");
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " and ", other_name, " differ in dtype");
  check_device(tensor, name, other, other_name);
}

// A map of another's shape and dtype: its result, its gradient.
inline void check_map_like(const Tensor& map, const char* name, const Tensor& other, const char* other_name) {
  check_shape(map, name, {other.size(0), other.size(1), other.size(2), other.size(3)});
  check_like(map, name, other, other_name);
  check_layout(map, name);
}

// A contiguous tensor in a map's dtype.
inline void check_beside(const Tensor& tensor, const char* name, const Tensor& map, const char* map_name,
                         const Shape& shape) {
  check_shape(tensor, name, shape);
  check_like(tensor, name, map, map_name);
  check_contiguous(tensor, name);
}

// A contiguous tensor beside the map x, in the type that sums are kept in, or in float64 where that is said: checked,
// and `numbers` pointed to what it holds.
template <typename Number>
void take(Number*& numbers, const Tensor& tensor, const char* name, const Tensor& x, const Shape& shape,
          bool wide = false) {
  check_shape(tensor, name, shape);
  const bool is_double = wide || x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(tensor.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float), name, ": expected ",
                  is_double ? "float64" : "float32");
  check_device(tensor, name, x, "x");
  check_contiguous(tensor, name);
  numbers = static_cast<Number*>(tensor.data_ptr());
}

// Null where there is none.
template <typename Number>
void take(Number*& numbers, const MaybeTensor& tensor, const char* name, const Tensor& x, const Shape& shape) {
  numbers = nullptr;
  if (tensor) take(numbers, *tensor, name, x, shape);
}
