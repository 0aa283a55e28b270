// adaptive_context's operators on the CPU: check, describe the work, share it out among torch's threads.
#include "adaptive_context.h"

#include <memory>

#include "../common/affinities_operator.h"
#include "../common/pages.h"

namespace {

const void* data_of(const MaybeTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

struct Inputs {
  const MaybeTensor &regions, &shift, &center;
};

AdaptiveContext describe(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales,
                         const Inputs& inputs, bool residual) {
  AdaptiveContext p{};
  p.affinities = describe_affinities(x, weight, bias, scales);
  const Affinities& a = p.affinities;
  check_small(inputs.regions, "regions", x, {a.batch, a.rows, a.channels});
  check_small(inputs.shift, "shift", x, {a.batch, x.size(1)});
  check_small(inputs.center, "center", x, {a.batch, a.rows});
  p.regions = data_of(inputs.regions), p.shift = data_of(inputs.shift), p.center = data_of(inputs.center);
  p.residual = residual;
  p.most_regions = most_regions(a);
  return p;
}

// What the units sum up; freed at the end of the scope.
class UnitSums {
 public:
  UnitSums(AdaptiveContext& p, bool with_squares) {
    const Affinities& a = p.affinities;
    const int64_t columns = padded(p.most_regions);
    p.unit_matrices = take(p, matrices_, a.channels * columns);
    p.unit_rows = take(p, rows_, p.most_regions);
    if (with_squares) p.unit_squares = take(p, squares_, p.most_regions * columns);
  }

 private:
  static void* take(const AdaptiveContext& p, std::unique_ptr<char[]>& memory, int64_t count) {
    const int64_t size = p.affinities.scalar == Scalar::float64 ? sizeof(double) : sizeof(float);
    memory.reset(new char[units(p.affinities) * count * size]);
    return memory.get();
  }
  std::unique_ptr<char[]> matrices_, rows_, squares_;
};

}  // namespace

void adaptive_context(const Tensor& x, const Tensor& regions, const Tensor& weight, const Tensor& bias,
                      const Scales& scales, const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                      const Tensor& z) {
  AdaptiveContext p = describe(x, weight, bias, scales, {regions, shift, center}, residual);
  check_map_like(z, "z", x);
  p.z = describe_map(z);
  request_huge_pages(p.z.data, z.numel() * z.element_size());
  torch::stable::parallel_for(0, units(p.affinities), 1,
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(aggregate, p, begin, end); });
}

void adaptive_context_backward_regions(const Tensor& grad, const Tensor& x, const Tensor& regions, const Tensor& weight,
                                       const Tensor& bias, const Scales& scales, const MaybeTensor& shift,
                                       const MaybeTensor& center, const Tensor& grad_regions, const Tensor& grad_shift,
                                       const Tensor& grad_bias, const Tensor& slope, const Tensor& slope_moments) {
  AdaptiveContext p = describe(x, weight, bias, scales, {regions, shift, center}, false);
  const Affinities& a = p.affinities;
  check_map_like(grad, "grad", x);
  check_small(grad_regions, "grad_regions", x, {a.batch, a.rows, a.channels});
  check_small(grad_shift, "grad_shift", x, {a.batch, x.size(1)});
  check_small(grad_bias, "grad_bias", x, {a.batch, a.rows});
  check_small(slope, "slope", x, {a.batch, a.rows});
  check_small(slope_moments, "slope_moments", x, {a.batch, a.pairs});
  p.grad = describe_map(grad);
  p.grad_regions = grad_regions.data_ptr(), p.grad_shift = grad_shift.data_ptr(), p.grad_bias = grad_bias.data_ptr();
  p.slope = slope.data_ptr(), p.slope_moments = slope_moments.data_ptr();
  const UnitSums sums(p, true);
  torch::stable::parallel_for(
      0, units(a), 1, [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(sum_region_gradients, p, begin, end); });
  torch::stable::parallel_for(0, a.batch * a.num_scales, 1, [&](int64_t begin, int64_t end) {
    APC_DISPATCH_ISA(merge_region_gradients, p, begin, end);
  });
}

void adaptive_context_backward_x(const MaybeTensor& grad, const Tensor& x, const MaybeTensor& regions,
                                 const Tensor& weight, const Tensor& bias, const Scales& scales,
                                 const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                                 const MaybeTensor& linear, const MaybeTensor& quadratic, const MaybeTensor& constant,
                                 const Tensor& grad_x, const Tensor& grad_weight, const Tensor& grad_bias) {
  STD_TORCH_CHECK(grad ? regions.has_value() : linear.has_value() && !residual,
                  "grad: expected grad and regions, or neither of them, no residual, but linear and quadratic");
  STD_TORCH_CHECK(linear.has_value() == quadratic.has_value() && (center || !linear),
                  "linear: expected linear, quadratic and center together");
  AdaptiveContext p = describe(x, weight, bias, scales, {regions, shift, center}, residual);
  const Affinities& a = p.affinities;
  if (grad) check_map_like(*grad, "grad", x);
  check_map_like(grad_x, "grad_x", x);
  check_small(linear, "linear", x, {a.batch, a.rows});
  check_small(quadratic, "quadratic", x, {a.batch, a.pairs});
  check_small(constant, "constant", x, {a.batch, x.size(1)});
  check_small(grad_weight, "grad_weight", x, {a.rows, a.channels});
  check_small(grad_bias, "grad_bias", x, {a.batch, a.rows});
  if (grad) p.grad = describe_map(*grad);
  p.linear = data_of(linear), p.quadratic = data_of(quadratic), p.constant = data_of(constant);
  p.grad_x = describe_map(grad_x);
  p.grad_weight = grad_weight.data_ptr(), p.grad_bias = grad_bias.data_ptr();
  request_huge_pages(p.grad_x.data, grad_x.numel() * grad_x.element_size());
  const UnitSums sums(p, false);
  torch::stable::parallel_for(0, units(a), 1,
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(write_x_gradients, p, begin, end); });
  torch::stable::parallel_for(
      0, a.num_scales, 1, [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(merge_weight_gradients, p, begin, end); });
}
