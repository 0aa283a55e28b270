// pyramid_pool's kernels and launches for every dtype.
#include "../common/launch.h"
#include "pyramid_pool_launch.h"

void launch_forward(const PyramidPoolCuda& p, MapType type, const Launcher& launch) {
  with_scalar(type, [&](auto scalar) { launch_forward<decltype(scalar)>(p, launch); });
}

void launch_backward(const PyramidPoolCuda& p, MapType type, const Launcher& launch) {
  with_scalar(type, [&](auto scalar) { launch_backward<decltype(scalar)>(p, launch); });
}
