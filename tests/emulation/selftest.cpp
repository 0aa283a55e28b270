// Kernels with planted faults: the emulation has to notice each of them.
#include "../../csrc/common/device.cuh"
#include "arrays.h"

namespace {

struct Params {
  float* out;  // one number for each thread
  bool with_barrier;
};

// Every thread reads its neighbour's number: wrong without the barrier.
void neighbour(Params p) {
  SHARED_BUFFER(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  numbers[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (p.with_barrier) __syncthreads();
  p.out[threadIdx.x] = numbers[(threadIdx.x + 1) % blockDim.x];
}

// A sum over each warp.
void warp_sum(Params p) {
  float sum = static_cast<float>(threadIdx.x);
  for (unsigned lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  p.out[threadIdx.x] = sum;
}

// Half of the threads leave before the barrier.
void early_return(Params p) {
  if (threadIdx.x % 2 == 0) return;
  __syncthreads();
  p.out[threadIdx.x] = 0;
}

void partial_mask(Params p) { p.out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }

// Every thread gets the number of the one two lanes up, the last two of a warp keep theirs.
void shuffle_down(Params p) {
  __syncwarp();
  p.out[threadIdx.x] = __shfl_down_sync(0xffffffffu, static_cast<float>(threadIdx.x), 2);
}

void misaligned(Params p) { load_vector<4>(p.out + 1); }

void overrun(Params) {
  SHARED_BUFFER(shared);
  reinterpret_cast<float*>(shared)[blockDim.x] = 0;
}

py::array_t<float> run(void (*kernel)(Params), bool with_barrier, uint32_t seed) {
  py::array_t<float> out(64);
  emulation::Launch{seed}(kernel, 1, 1, 64, 64 * sizeof(float), Params{out.mutable_data(), with_barrier});
  return out;
}

}  // namespace

void bind_selftest(py::module_& module) {
  module.def("neighbour", [](bool with_barrier, uint32_t seed) { return run(neighbour, with_barrier, seed); });
  module.def("warp_sum", [](uint32_t seed) { return run(warp_sum, true, seed); });
  module.def("early_return", [](uint32_t seed) { return run(early_return, true, seed); });
  module.def("partial_mask", [](uint32_t seed) { return run(partial_mask, true, seed); });
  module.def("shuffle_down", [](uint32_t seed) { return run(shuffle_down, true, seed); });
  module.def("misaligned", [](uint32_t seed) { return run(misaligned, true, seed); });
  module.def("overrun", [](uint32_t seed) { return run(overrun, true, seed); });
}
