// adaptive_context's kernels and launches, forward, for every dtype.
#include "../common/launch.h"
#include "adaptive_context_launch.h"

void launch_aggregate(const AdaptiveContextCuda& p, MapType type, const Launcher& launch) {
  with_scalar(type, [&](auto scalar) { launch_aggregate<decltype(scalar)>(p, launch); });
}
