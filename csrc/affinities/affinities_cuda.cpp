// The operators on affinities on the GPU: the work described to the kernels, a workspace, the launches.
#include "affinities_cuda.h"

#include "../common/on_device.h"
#include "operators.h"

namespace {

struct Cuda {
  using AdaptiveContext = AdaptiveContextCuda;
  using AffinityMoments = AffinityMomentsCuda;

  static MapCuda describe_map(const Tensor& map) {
    return describe_map_cuda(map.sizes().data(), map.strides().data(), map.data_ptr());
  }

  static void describe(AffinitiesCuda& p, const Tensor& x, const Scales& scales, bool sums_positions) {
    describe_affinities_cuda(p, x.sizes().data(), x.strides().data(), scales, x.data_ptr(), x.element_size(),
                             sums_positions ? CHUNKED_BLOCKS : 0);
  }

  // launch(p, the map's dtype, launcher), with a workspace. That may go when the launches are queued: torch hands it
  // out again on this stream only.
  template <typename Params>
  static void run(void (*launch)(const Params&, MapType, const Launcher&), Params& p, const Tensor& x) {
    const MapType type = map_type(x, "x");
    const OnDevice device(x);
    const size_t size = x.element_size();
    const Tensor workspace = torch::stable::new_empty(x, {arrange(p, nullptr, size)}, ScalarType::Byte);
    arrange(p, workspace.data_ptr(), size);
    launch(p, type, device.launcher());
  }

  static void aggregate(AdaptiveContextCuda& p, const Tensor& x) { run(launch_aggregate, p, x); }
  static void sum_region_gradients(AdaptiveContextCuda& p, const Tensor& x) { run(launch_region_gradients, p, x); }
  static void write_x_gradients(AdaptiveContextCuda& p, const Tensor& x) { run(launch_x_gradients, p, x); }
  static void sum_moments(AffinityMomentsCuda& p, const Tensor& x) { run(launch_moments, p, x); }
};

}  // namespace

APC_REGISTER(apc_kernels_cuda, CUDA, AFFINITY_OPERATORS<Cuda>)
