// From tensors to the parameters of the CUDA kernels on affinities. Tensors are checked here, or by operators.h.
#pragma once

#include "../adaptive_context/operators.h"
#include "affinities_launch.h"
#include "launch.h"

inline const float* floats(const MaybeTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}
inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

inline MapCuda describe_map_cuda(const Tensor& map) {
  return describe_map_cuda(map.sizes().data(), map.strides().data(), map.data_ptr());
}

template <typename Params>
Params describe_affinities_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales,
                                int target_blocks) {
  check_affinities(x, weight, bias, scales);
  return describe_affinities_cuda<Params>(x.sizes().data(), x.strides().data(), scales, x.data_ptr(), floats(weight),
                                          floats(bias), target_blocks);
}

// What `arrange` lays out. It may go when the launches are queued: torch hands it out again on this stream only.
template <typename Params>
Tensor allocate_workspace(const Tensor& x, Params& p) {
  Tensor workspace =
      torch::stable::new_empty(x, {arrange(p, nullptr, x.element_size())}, torch::headeronly::ScalarType::Byte);
  arrange(p, workspace.data_ptr(), x.element_size());
  return workspace;
}
