// What starts CUDA kernels, without torch: nvcc reads every header of a .cu file once for each architecture, and
// torch's take it longer than most kernels. Files *_cuda.cpp hold the operators, which need them; both sides include
// this.
#pragma once

#include <cuda_runtime_api.h>

// The dtype of a map.
enum class MapType { float32, bfloat16, float16 };

// Called like a function, launches a kernel on a stream.
struct Launcher {
  cudaStream_t stream;
  void (*check)(cudaError_t);  // throws where it is an error

  template <typename Params>
  void operator()(void (*kernel)(Params), int grid_x, int grid_y, int threads, int shared_bytes,
                  const Params& p) const {
    constexpr int GRANTED = 48 * 1024;  // what every kernel may have without asking
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > GRANTED)
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    void* parameters[] = {const_cast<Params*>(&p)};
    check(cudaLaunchKernel(function, dim3(unsigned(grid_x), unsigned(grid_y)), dim3(unsigned(threads)), parameters,
                           size_t(shared_bytes), stream));
  }
};

#ifdef __CUDACC__

#include "device.cuh"

// function(a number of that type)
template <typename Function>
void with_scalar(MapType type, Function function) {
  switch (type) {
    case MapType::float32: return function(float{});
    case MapType::bfloat16: return function(BFloat16{});
    case MapType::float16: return function(Half{});
  }
}

#endif
