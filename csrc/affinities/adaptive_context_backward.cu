// adaptive_context's kernels and launches, backward, for every dtype.
#include "../common/launch.h"
#include "adaptive_context_launch.h"

void launch_region_gradients(const AdaptiveContextCuda& p, MapType type, const Launcher& launch) {
  with_scalar(type, [&](auto scalar) { launch_region_gradients<decltype(scalar)>(p, launch); });
}

void launch_x_gradients(const AdaptiveContextCuda& p, MapType type, const Launcher& launch) {
  with_scalar(type, [&](auto scalar) { launch_x_gradients<decltype(scalar)>(p, launch); });
}
