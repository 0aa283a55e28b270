// numpy arrays for CUDA kernels without a GPU: strides in elements, a dtype's name turned into a type. g++ compiles the
// files that include this one for the emulation, nvcc for the machine that executes PTX (tests/ptx).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#ifdef __CUDACC__
#include "../ptx/cuda/runtime.h"
#else
#include "emulation.h"
using emulation::Launch, emulation::DeviceMemory;
#endif

namespace py = pybind11;

inline std::vector<int64_t> element_strides(const py::array& array) {
  std::vector<int64_t> strides;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) strides.push_back(array.strides(i) / array.itemsize());
  return strides;
}

inline std::vector<int64_t> sizes(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

// numpy has no bfloat16, so arrays of it come as uint16 beside the name.
template <typename Function>
void with_scalar(const std::string& dtype, Function function) {
  if (dtype == "float32")
    function(float{});
  else if (dtype == "bfloat16")
    function(BFloat16{});
  else if (dtype == "float16")
    function(Half{});
  else
    throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got " + dtype);
}
