// The operators on affinities on the GPU: the work described to the kernels, a workspace, the launches.
#include "../common/launch.h"
#include "affinities_launch.h"
#include "operators.h"

namespace {

struct Cuda {
  using AdaptiveContext = AdaptiveContextCuda;
  using AffinityMoments = AffinityMomentsCuda;

  static MapCuda describe_map(const Tensor& map) {
    return describe_map_cuda(map.sizes().data(), map.strides().data(), map.data_ptr());
  }

  static void describe(AffinitiesCuda& p, const Tensor& x, const Scales& scales, bool sums_positions) {
    describe_affinities_cuda(p, x.sizes().data(), x.strides().data(), scales, x.data_ptr(),
                             sums_positions ? CHUNKED_BLOCKS : 0);
  }

  // launch(a number of the map's dtype, launcher), with a workspace. That may go when the launches are queued: torch
  // hands it out again on this stream only.
  template <typename Params, typename Launch>
  static void run(Params& p, const Tensor& x, Launch launch) {
    const OnDevice device(x);
    const size_t size = x.element_size();
    const Tensor workspace = torch::stable::new_empty(x, {arrange(p, nullptr, size)}, ScalarType::Byte);
    arrange(p, workspace.data_ptr(), size);
    with_scalar(x, "x", [&](auto scalar) { launch(scalar, device); });
  }

  static void aggregate(AdaptiveContextCuda& p, const Tensor& x) {
    run(p, x, [&](auto scalar, const OnDevice& device) { launch_aggregate<decltype(scalar)>(p, device); });
  }
  static void sum_region_gradients(AdaptiveContextCuda& p, const Tensor& x) {
    run(p, x, [&](auto scalar, const OnDevice& device) { launch_region_gradients<decltype(scalar)>(p, device); });
  }
  static void write_x_gradients(AdaptiveContextCuda& p, const Tensor& x) {
    run(p, x, [&](auto scalar, const OnDevice& device) { launch_x_gradients<decltype(scalar)>(p, device); });
  }
  static void sum_moments(AffinityMomentsCuda& p, const Tensor& x) {
    run(p, x, [&](auto scalar, const OnDevice& device) { launch_moments<decltype(scalar)>(p, device); });
  }
};

}  // namespace

APC_REGISTER(apc_kernels_cuda, CUDA, AFFINITY_OPERATORS<Cuda>)
