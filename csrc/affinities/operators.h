// The operators on affinities, written once for both libraries: their schemas, what they ask of their arguments, and
// how they describe the work to kernels. Each writes into the tensors it is given last
// (apc_kernels/ops/affinities/reference.py says what).
//
// A Device (affinities.cpp, affinities.cu) names its kernels' parameters and map, and runs the kernels: `describe`
// fills in what x and the scales say, `aggregate` and the others get a tensor on the right device in the map's dtype.
#pragma once

#include "../common/operator.h"

constexpr int64_t MAX_AFFINITY_SCALES = 64, MAX_AFFINITY_SCALE = 32;

// sums_positions: whether the results are sums over positions, which are cut into chunks then.
template <typename Device, typename Params>
Params describe_affinities(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales,
                           bool sums_positions) {
  check_dimensions(x, "x", 4);
  STD_TORCH_CHECK(x.numel() > 0, "x: expected a map that is not empty");
  check_layout(x, "x");
  const int64_t count = static_cast<int64_t>(scales.size());
  STD_TORCH_CHECK(count >= 1 && count <= MAX_AFFINITY_SCALES, "scales: expected 1 to ", MAX_AFFINITY_SCALES, " scales");
  STD_TORCH_CHECK(x.size(1) % count == 0, "x: expected a multiple of ", count, " channels, got ", x.size(1));
  for (int64_t s : scales)
    STD_TORCH_CHECK(s >= 1 && s <= MAX_AFFINITY_SCALE, "scales: expected scales of 1 to ", MAX_AFFINITY_SCALE);
  Params p{};
  Device::describe(p, x, scales, sums_positions);
  take(p.weight, weight, "weight", x, {p.rows, p.channels});
  take(p.bias, bias, "bias", x, {p.batch, p.rows});
  return p;
}

template <typename Device>
typename Device::AdaptiveContext describe_context(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                  const Scales& scales, const MaybeTensor& regions,
                                                  const MaybeTensor& shift, const MaybeTensor& center,
                                                  bool sums_positions) {
  auto p = describe_affinities<Device, typename Device::AdaptiveContext>(x, weight, bias, scales, sums_positions);
  take(p.regions, regions, "regions", x, {p.batch, p.rows, p.channels});
  take(p.shift, shift, "shift", x, {p.batch, x.size(1)});
  take(p.center, center, "center", x, {p.batch, p.rows});
  return p;
}

template <typename Device>
auto map_like(const Tensor& map, const char* name, const Tensor& x) {
  check_map_like(map, name, x, "x");
  return Device::describe_map(map);
}

template <typename Device>
void adaptive_context(const Tensor& x, const Tensor& regions, const Tensor& weight, const Tensor& bias,
                      const Scales& scales, const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                      const Tensor& z) {
  auto p = describe_context<Device>(x, weight, bias, scales, regions, shift, center, false);
  p.residual = residual;
  p.z = map_like<Device>(z, "z", x);
  Device::aggregate(p, z);
}

template <typename Device>
void adaptive_context_backward_regions(const Tensor& grad, const Tensor& x, const Tensor& regions, const Tensor& weight,
                                       const Tensor& bias, const Scales& scales, const MaybeTensor& shift,
                                       const MaybeTensor& center, const Tensor& grad_regions, const Tensor& grad_shift,
                                       const Tensor& grad_bias, const Tensor& slope, const Tensor& slope_moments) {
  auto p = describe_context<Device>(x, weight, bias, scales, regions, shift, center, true);
  p.grad = map_like<Device>(grad, "grad", x);
  take(p.grad_regions, grad_regions, "grad_regions", x, {p.batch, p.rows, p.channels});
  take(p.grad_shift, grad_shift, "grad_shift", x, {p.batch, x.size(1)});
  take(p.grad_bias, grad_bias, "grad_bias", x, {p.batch, p.rows});
  take(p.slope, slope, "slope", x, {p.batch, p.rows});
  take(p.slope_moments, slope_moments, "slope_moments", x, {p.batch, p.pairs});
  Device::sum_region_gradients(p, x);
}

template <typename Device>
void adaptive_context_backward_x(const MaybeTensor& grad, const Tensor& x, const MaybeTensor& regions,
                                 const Tensor& weight, const Tensor& bias, const Scales& scales,
                                 const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                                 const MaybeTensor& linear, const MaybeTensor& quadratic, const MaybeTensor& constant,
                                 const Tensor& grad_x, const Tensor& grad_weight, const Tensor& grad_bias) {
  STD_TORCH_CHECK(grad ? regions.has_value() : linear.has_value() && !residual,
                  "grad: expected grad and regions, or neither of them, no residual, but linear and quadratic");
  STD_TORCH_CHECK(linear.has_value() == quadratic.has_value() && (center || !linear),
                  "linear: expected linear, quadratic and center together");
  const MaybeTensor needed = grad ? regions : MaybeTensor();
  auto p = describe_context<Device>(x, weight, bias, scales, needed, shift, center, true);
  p.residual = residual;
  if (grad) p.grad = map_like<Device>(*grad, "grad", x);
  p.grad_x = map_like<Device>(grad_x, "grad_x", x);
  take(p.linear, linear, "linear", x, {p.batch, p.rows});
  take(p.quadratic, quadratic, "quadratic", x, {p.batch, p.pairs});
  take(p.constant, constant, "constant", x, {p.batch, x.size(1)});
  take(p.grad_weight, grad_weight, "grad_weight", x, {p.rows, p.channels});
  take(p.grad_bias, grad_bias, "grad_bias", x, {p.batch, p.rows});
  Device::write_x_gradients(p, grad_x);
}

template <typename Device>
void affinity_moments(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales,
                      const Tensor& mean, const Tensor& covariance) {
  auto p = describe_affinities<Device, typename Device::AffinityMoments>(x, weight, bias, scales, true);
  take(p.mean, mean, "mean", x, {p.batch, p.rows}, true);
  take(p.covariance, covariance, "covariance", x, {p.batch, p.pairs}, true);
  Device::sum_moments(p, x);
}

template <typename Device>
constexpr Operator AFFINITY_OPERATORS[] = {
    {"adaptive_context(Tensor x, Tensor regions, Tensor weight, Tensor bias, int[] scales, Tensor? shift, "
     "bool residual, Tensor? center, Tensor(a!) z) -> ()",
     TORCH_BOX(&adaptive_context<Device>)},
    {"adaptive_context_backward_regions(Tensor grad, Tensor x, Tensor regions, Tensor weight, Tensor bias, "
     "int[] scales, Tensor? shift, Tensor? center, Tensor(a!) grad_regions, Tensor(b!) grad_shift, "
     "Tensor(c!) grad_bias, Tensor(d!) slope, Tensor(e!) slope_moments) -> ()",
     TORCH_BOX(&adaptive_context_backward_regions<Device>)},
    {"adaptive_context_backward_x(Tensor? grad, Tensor x, Tensor? regions, Tensor weight, Tensor bias, int[] scales, "
     "Tensor? shift, bool residual, Tensor? center, Tensor? linear, Tensor? quadratic, Tensor? constant, "
     "Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias) -> ()",
     TORCH_BOX(&adaptive_context_backward_x<Device>)},
    {"affinity_moments(Tensor x, Tensor weight, Tensor bias, int[] scales, Tensor(a!) mean, Tensor(b!) covariance) "
     "-> ()",
     TORCH_BOX(&affinity_moments<Device>)},
};
