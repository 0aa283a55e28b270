// adaptive_context's operators on the GPU.
#include "../common/affinities_cuda.h"
#include "adaptive_context_launch.h"

namespace {

struct Inputs {
  const MaybeTensor &regions, &shift, &center;
};

AdaptiveContextCuda describe(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales,
                             const Inputs& inputs, bool residual, int target_blocks) {
  auto p = describe_affinities_cuda<AdaptiveContextCuda>(x, weight, bias, scales, target_blocks);
  check_small(inputs.regions, "regions", x, {p.batch, p.rows, p.channels});
  check_small(inputs.shift, "shift", x, {p.batch, x.size(1)});
  check_small(inputs.center, "center", x, {p.batch, p.rows});
  p.regions = floats(inputs.regions), p.shift = floats(inputs.shift), p.center = floats(inputs.center);
  p.residual = residual;
  return p;
}

}  // namespace

void adaptive_context_cuda(const Tensor& x, const Tensor& regions, const Tensor& weight, const Tensor& bias,
                           const Scales& scales, const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                           const Tensor& z) {
  AdaptiveContextCuda p = describe(x, weight, bias, scales, {regions, shift, center}, residual, 0);
  check_map_like(z, "z", x);
  p.z = describe_map_cuda(z);
  const OnDevice device(x);
  const Tensor workspace = allocate_workspace(x, p);
  APC_DISPATCH_SCALAR(x, launch_aggregate, p, device);
}

void adaptive_context_backward_regions_cuda(const Tensor& grad, const Tensor& x, const Tensor& regions,
                                            const Tensor& weight, const Tensor& bias, const Scales& scales,
                                            const MaybeTensor& shift, const MaybeTensor& center,
                                            const Tensor& grad_regions, const Tensor& grad_shift,
                                            const Tensor& grad_bias, const Tensor& slope, const Tensor& slope_moments) {
  AdaptiveContextCuda p = describe(x, weight, bias, scales, {regions, shift, center}, false, CHUNKED_BLOCKS);
  check_map_like(grad, "grad", x);
  check_small(grad_regions, "grad_regions", x, {p.batch, p.rows, p.channels});
  check_small(grad_shift, "grad_shift", x, {p.batch, x.size(1)});
  check_small(grad_bias, "grad_bias", x, {p.batch, p.rows});
  check_small(slope, "slope", x, {p.batch, p.rows});
  check_small(slope_moments, "slope_moments", x, {p.batch, p.pairs});
  p.grad = describe_map_cuda(grad);
  p.grad_regions = floats(grad_regions), p.grad_shift = floats(grad_shift), p.grad_bias = floats(grad_bias);
  p.slope = floats(slope), p.slope_moments = floats(slope_moments);
  const OnDevice device(x);
  const Tensor workspace = allocate_workspace(x, p);
  APC_DISPATCH_SCALAR(x, launch_region_gradients, p, device);
}

void adaptive_context_backward_x_cuda(const MaybeTensor& grad, const Tensor& x, const MaybeTensor& regions,
                                      const Tensor& weight, const Tensor& bias, const Scales& scales,
                                      const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                                      const MaybeTensor& linear, const MaybeTensor& quadratic,
                                      const MaybeTensor& constant, const Tensor& grad_x, const Tensor& grad_weight,
                                      const Tensor& grad_bias) {
  STD_TORCH_CHECK(grad ? regions.has_value() : linear.has_value() && !residual,
                  "grad: expected grad and regions, or neither of them, no residual, but linear and quadratic");
  STD_TORCH_CHECK(linear.has_value() == quadratic.has_value() && (center || !linear),
                  "linear: expected linear, quadratic and center together");
  AdaptiveContextCuda p =
      describe(x, weight, bias, scales, {grad ? regions : MaybeTensor(), shift, center}, residual, CHUNKED_BLOCKS);
  if (grad) check_map_like(*grad, "grad", x);
  check_map_like(grad_x, "grad_x", x);
  check_small(linear, "linear", x, {p.batch, p.rows});
  check_small(quadratic, "quadratic", x, {p.batch, p.pairs});
  check_small(constant, "constant", x, {p.batch, x.size(1)});
  check_small(grad_weight, "grad_weight", x, {p.rows, p.channels});
  check_small(grad_bias, "grad_bias", x, {p.batch, p.rows});
  if (grad) p.grad = describe_map_cuda(*grad);
  p.linear = floats(linear), p.quadratic = floats(quadratic), p.constant = floats(constant);
  p.grad_x = describe_map_cuda(grad_x);
  p.grad_weight = floats(grad_weight), p.grad_bias = floats(grad_bias);
  const OnDevice device(x);
  const Tensor workspace = allocate_workspace(x, p);
  APC_DISPATCH_SCALAR(x, launch_x_gradients, p, device);
}
