// pyramid_pool's operators on the GPU.
#include "../common/launch.h"
#include "operators.h"
#include "pyramid_pool_launch.h"

namespace {

PyramidPoolCuda describe(const Tensor& map, const Tensor& pooled, const std::vector<int64_t>& scales) {
  check_pyramid_pool(map, pooled, scales);
  return describe_pyramid_pool(map.sizes().data(), map.strides().data(), scales, map.data_ptr(), pooled.data_ptr());
}

}  // namespace

void pyramid_pool_cuda(const Tensor& x, const std::vector<int64_t>& scales, const Tensor& out) {
  PyramidPoolCuda p = describe(x, out, scales);
  const OnDevice device(x);
  const Tensor row_sums =
      torch::stable::new_empty(x, {p.batch, p.segments, p.chunks, p.columns, p.channels}, ScalarType::Float);
  p.row_sums = static_cast<float*>(row_sums.data_ptr());
  APC_DISPATCH_SCALAR(x, launch_forward, p, device);
}

void pyramid_pool_backward_cuda(const Tensor& grad, const std::vector<int64_t>& scales, const Tensor& grad_x) {
  const PyramidPoolCuda p = describe(grad_x, grad, scales);
  const OnDevice device(grad_x);
  APC_DISPATCH_SCALAR(grad_x, launch_backward, p, device);
}
