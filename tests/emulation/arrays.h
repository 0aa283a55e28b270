// numpy arrays for CUDA kernels without a GPU: sizes, and strides in elements.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <vector>

namespace py = pybind11;

inline std::vector<int64_t> element_strides(const py::array& array) {
  std::vector<int64_t> strides;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) strides.push_back(array.strides(i) / array.itemsize());
  return strides;
}

inline std::vector<int64_t> sizes(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }
