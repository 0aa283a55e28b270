// The launches of pyramid_pool's CUDA kernels, with row sums that nobody has written.
#include <vector>

#include "../../csrc/pyramid_pool/pyramid_pool_launch.h"
#include "launches.h"

void run_pyramid_pool(PyramidPoolCuda& p, const std::string& dtype, uint32_t seed) {
  DeviceMemory row_sums(size_t(p.batch) * p.segments * p.chunks * p.columns * p.padded * sizeof(float));
  p.row_sums = static_cast<float*>(row_sums.data());
  with_scalar(dtype, [&](auto scalar) { launch_forward<decltype(scalar)>(p, Launch{seed}); });
}

void run_pyramid_pool_backward(PyramidPoolCuda& p, const std::string& dtype, uint32_t seed) {
  with_scalar(dtype, [&](auto scalar) { launch_backward<decltype(scalar)>(p, Launch{seed}); });
}
