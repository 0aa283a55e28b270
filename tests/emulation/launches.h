// The launches of every CUDA operation: dtypes by name, memory for intermediate results. The files *_launches.cpp are
// compiled twice: by g++ for the emulation, by nvcc for the machine that executes PTX (tests/ptx). The bindings
// (affinities.cpp, pyramid_pool.cpp) call either, and know nothing of CUDA: pybind11 costs nvcc half a minute.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include "../ptx/cuda/runtime.h"
#else
#include "emulation.h"
using emulation::Launch, emulation::DeviceMemory;
#endif

struct PyramidPoolCuda;
struct AdaptiveContextCuda;
struct AffinityMomentsCuda;

void run_pyramid_pool(PyramidPoolCuda& p, const std::string& dtype, uint32_t seed);
void run_pyramid_pool_backward(PyramidPoolCuda& p, const std::string& dtype, uint32_t seed);
void run_adaptive_context(AdaptiveContextCuda& p, const std::string& dtype, uint32_t seed);
void run_region_gradients(AdaptiveContextCuda& p, const std::string& dtype, uint32_t seed);
void run_x_gradients(AdaptiveContextCuda& p, const std::string& dtype, uint32_t seed);
void run_affinity_moments(AffinityMomentsCuda& p, const std::string& dtype, uint32_t seed);

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
