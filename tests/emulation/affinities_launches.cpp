// The launches of the CUDA kernels on affinities, with a workspace that nobody has written.
#include "../../csrc/affinities/adaptive_context_launch.h"
#include "../../csrc/affinities/affinity_moments_launch.h"
#include "launches.h"

namespace {

// launch(a number of that dtype, launcher), the workspace of p laid out.
template <typename Params, typename Function>
void run(Params& p, const std::string& dtype, uint32_t seed, Function launch) {
  with_scalar(dtype, [&](auto scalar) {
    DeviceMemory memory(size_t(arrange(p, nullptr, sizeof scalar)));
    arrange(p, memory.data(), sizeof scalar);
    launch(scalar, Launch{seed});
  });
}

}  // namespace

void run_adaptive_context(AdaptiveContextCuda& p, const std::string& dtype, uint32_t seed) {
  run(p, dtype, seed, [&](auto scalar, auto launch) { launch_aggregate<decltype(scalar)>(p, launch); });
}

void run_region_gradients(AdaptiveContextCuda& p, const std::string& dtype, uint32_t seed) {
  run(p, dtype, seed, [&](auto scalar, auto launch) { launch_region_gradients<decltype(scalar)>(p, launch); });
}

void run_x_gradients(AdaptiveContextCuda& p, const std::string& dtype, uint32_t seed) {
  run(p, dtype, seed, [&](auto scalar, auto launch) { launch_x_gradients<decltype(scalar)>(p, launch); });
}

void run_affinity_moments(AffinityMomentsCuda& p, const std::string& dtype, uint32_t seed) {
  run(p, dtype, seed, [&](auto scalar, auto launch) { launch_moments<decltype(scalar)>(p, launch); });
}
