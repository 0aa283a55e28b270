// pyramid_pool's operators on the GPU: the work described to the launches.
#include "pyramid_pool_cuda.h"

#include "../common/on_device.h"
#include "operators.h"

namespace {

struct Cuda {
  static PyramidPoolCuda describe(const Tensor& map, const Tensor& pooled, const Scales& scales) {
    return describe_pyramid_pool(map.sizes().data(), map.strides().data(), scales, map.data_ptr(), pooled.data_ptr());
  }

  static void pool(const Tensor& x, const Scales& scales, const Tensor& out) {
    PyramidPoolCuda p = describe(x, out, scales);
    const OnDevice device(x);
    const Tensor row_sums =
        torch::stable::new_empty(x, {p.batch, p.segments, p.chunks, p.columns, p.padded}, ScalarType::Float);
    p.row_sums = static_cast<float*>(row_sums.data_ptr());
    launch_forward(p, map_type(x, "x"), device.launcher());
  }

  static void spread(const Tensor& grad, const Scales& scales, const Tensor& grad_x) {
    const PyramidPoolCuda p = describe(grad_x, grad, scales);
    const OnDevice device(grad_x);
    launch_backward(p, map_type(grad_x, "grad_x"), device.launcher());
  }
};

}  // namespace

APC_REGISTER(apc_kernels_cuda, CUDA, PYRAMID_POOL_OPERATORS<Cuda>)
