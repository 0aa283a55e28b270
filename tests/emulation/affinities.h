// What the emulated kernels on affinities share: numpy arrays into parameters, a workspace that holds NaN.
#pragma once

#include <optional>

#include "../../csrc/common/affinities_launch.h"
#include "arrays.h"

using MaybeArray = std::optional<py::array>;
using Scales = std::vector<int64_t>;

inline const float* floats(const MaybeArray& array) {
  return array ? static_cast<const float*>(array->data()) : nullptr;
}
inline float* floats(py::array& array) { return static_cast<float*>(array.mutable_data()); }

inline MapCuda describe_map(py::array& map) {
  return describe_map_cuda(sizes(map).data(), element_strides(map).data(), map.mutable_data());
}

template <typename Params>
Params describe_affinities(py::array& x, const py::array& weight, const py::array& bias, const Scales& scales,
                           int target_blocks) {
  return describe_affinities_cuda<Params>(sizes(x).data(), element_strides(x).data(), scales, x.mutable_data(),
                                          floats(weight), floats(bias), target_blocks);
}

// function(a scalar of that dtype), the workspace of p laid out.
template <typename Params, typename Function>
void with_workspace(Params& p, const std::string& dtype, Function function) {
  with_scalar(dtype, [&](auto scalar) {
    std::vector<double> memory(arrange(p, nullptr, sizeof scalar) / sizeof(double));
    std::fill_n(reinterpret_cast<unsigned char*>(memory.data()), memory.size() * sizeof(double), emulation::POISON);
    arrange(p, memory.data(), sizeof scalar);
    function(scalar);
  });
}
