// What the launches of CUDA kernels (tests/emulation) take from the emulation, where nvcc compiles them for the machine
// that executes PTX. Launches are CUDA's own; runtime.cpp, linked in the place of NVIDIA's runtime, hands them on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

using BFloat16 = __nv_bfloat16;
using Half = __half;

void* allocate_memory(size_t bytes);
void set_seed(uint32_t seed);

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : memory_(allocate_memory(bytes)) {}
  void* data() { return memory_; }

 private:
  void* memory_;
};

struct Launch {
  uint32_t seed;

  template <typename Params>
  void operator()(void (*kernel)(Params), int grid_x, int grid_y, int threads, int shared_bytes,
                  const Params& p) const {
    set_seed(seed);
    kernel<<<dim3(unsigned(grid_x), unsigned(grid_y)), unsigned(threads), size_t(shared_bytes)>>>(p);
  }
};
