// affinity_moments' kernels and launches for every dtype.
#include "../common/launch.h"
#include "affinity_moments_launch.h"

void launch_moments(const AffinityMomentsCuda& p, MapType type, const Launcher& launch) {
  with_scalar(type, [&](auto scalar) { launch_moments<decltype(scalar)>(p, launch); });
}
