// adaptive_context's CUDA kernels on the emulation.
#include "../../csrc/adaptive_context/adaptive_context_launch.h"
#include "affinities.h"

namespace {

AdaptiveContextCuda describe(py::array& x, const py::array& weight, const py::array& bias, const Scales& scales,
                             int target_blocks) {
  return describe_affinities<AdaptiveContextCuda>(x, weight, bias, scales, target_blocks);
}

void forward(py::array x, const std::string& dtype, py::array regions, py::array weight, py::array bias, Scales scales,
             MaybeArray shift, bool residual, MaybeArray center, py::array z, uint32_t seed) {
  AdaptiveContextCuda p = describe(x, weight, bias, scales, 0);
  p.regions = floats(regions), p.shift = floats(shift), p.center = floats(center);
  p.residual = residual;
  p.z = describe_map(z);
  with_workspace(p, dtype, [&](auto scalar) { launch_aggregate<decltype(scalar)>(p, emulation::Launch{seed}); });
}

void backward_regions(py::array grad, py::array x, const std::string& dtype, py::array regions, py::array weight,
                      py::array bias, Scales scales, MaybeArray shift, MaybeArray center, py::array grad_regions,
                      py::array grad_shift, py::array grad_bias, py::array slope, py::array slope_moments,
                      int target_blocks, uint32_t seed) {
  AdaptiveContextCuda p = describe(x, weight, bias, scales, target_blocks);
  p.regions = floats(regions), p.shift = floats(shift), p.center = floats(center);
  p.grad = describe_map(grad);
  p.grad_regions = floats(grad_regions), p.grad_shift = floats(grad_shift), p.grad_bias = floats(grad_bias);
  p.slope = floats(slope), p.slope_moments = floats(slope_moments);
  with_workspace(p, dtype, [&](auto scalar) { launch_region_gradients<decltype(scalar)>(p, emulation::Launch{seed}); });
}

void backward_x(MaybeArray grad, py::array x, const std::string& dtype, MaybeArray regions, py::array weight,
                py::array bias, Scales scales, MaybeArray shift, bool residual, MaybeArray center, MaybeArray linear,
                MaybeArray quadratic, MaybeArray constant, py::array grad_x, py::array grad_weight, py::array grad_bias,
                int target_blocks, uint32_t seed) {
  AdaptiveContextCuda p = describe(x, weight, bias, scales, target_blocks);
  p.regions = floats(regions), p.shift = floats(shift), p.center = floats(center);
  p.residual = residual;
  if (grad) p.grad = describe_map(*grad);
  p.linear = floats(linear), p.quadratic = floats(quadratic), p.constant = floats(constant);
  p.grad_x = describe_map(grad_x);
  p.grad_weight = floats(grad_weight), p.grad_bias = floats(grad_bias);
  with_workspace(p, dtype, [&](auto scalar) { launch_x_gradients<decltype(scalar)>(p, emulation::Launch{seed}); });
}

}  // namespace

void bind_adaptive_context(py::module_& module) {
  module.def("adaptive_context", forward);
  module.def("adaptive_context_backward_regions", backward_regions);
  module.def("adaptive_context_backward_x", backward_x);
}
