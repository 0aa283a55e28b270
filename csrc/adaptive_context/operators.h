// The operators on affinities, as the CPU library registers them, and the checks that all of them share.
#pragma once

#include "../common/tensor.h"

using Scales = std::vector<int64_t>;

// Each writes into the tensors it is given last (apc_kernels/ops/adaptive_context/reference.py says what).
void adaptive_context(const Tensor& x, const Tensor& regions, const Tensor& weight, const Tensor& bias,
                      const Scales& scales, const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                      const Tensor& z);
void adaptive_context_backward_regions(const Tensor& grad, const Tensor& x, const Tensor& regions, const Tensor& weight,
                                       const Tensor& bias, const Scales& scales, const MaybeTensor& shift,
                                       const MaybeTensor& center, const Tensor& grad_regions, const Tensor& grad_shift,
                                       const Tensor& grad_bias, const Tensor& slope, const Tensor& slope_moments);
void adaptive_context_backward_x(const MaybeTensor& grad, const Tensor& x, const MaybeTensor& regions,
                                 const Tensor& weight, const Tensor& bias, const Scales& scales,
                                 const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                                 const MaybeTensor& linear, const MaybeTensor& quadratic, const MaybeTensor& constant,
                                 const Tensor& grad_x, const Tensor& grad_weight, const Tensor& grad_bias);
void affinity_moments(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales,
                      const Tensor& mean, const Tensor& covariance);
void adaptive_context_cuda(const Tensor& x, const Tensor& regions, const Tensor& weight, const Tensor& bias,
                           const Scales& scales, const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                           const Tensor& z);
void adaptive_context_backward_regions_cuda(const Tensor& grad, const Tensor& x, const Tensor& regions,
                                            const Tensor& weight, const Tensor& bias, const Scales& scales,
                                            const MaybeTensor& shift, const MaybeTensor& center,
                                            const Tensor& grad_regions, const Tensor& grad_shift,
                                            const Tensor& grad_bias, const Tensor& slope, const Tensor& slope_moments);
void adaptive_context_backward_x_cuda(const MaybeTensor& grad, const Tensor& x, const MaybeTensor& regions,
                                      const Tensor& weight, const Tensor& bias, const Scales& scales,
                                      const MaybeTensor& shift, bool residual, const MaybeTensor& center,
                                      const MaybeTensor& linear, const MaybeTensor& quadratic,
                                      const MaybeTensor& constant, const Tensor& grad_x, const Tensor& grad_weight,
                                      const Tensor& grad_bias);
void affinity_moments_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales,
                           const Tensor& mean, const Tensor& covariance);

constexpr int64_t MAX_AFFINITY_SCALES = 64, MAX_AFFINITY_SCALE = 32;

// Sums over the scales: of s*s and of s^4.
struct AffinitySizes {
  int64_t batch, channels, rows, pairs;
};

// A map of x's shape and dtype: its result, its gradient.
inline void check_map_like(const Tensor& map, const char* name, const Tensor& x) {
  check_shape(map, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_like(map, name, x, "x");
  check_layout(map, name);
}

inline AffinitySizes check_affinities(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.numel() > 0, "x: expected a map that is not empty");
  check_layout(x, "x");
  const int64_t count = static_cast<int64_t>(scales.size());
  STD_TORCH_CHECK(count >= 1 && count <= MAX_AFFINITY_SCALES, "scales: expected 1 to ", MAX_AFFINITY_SCALES, " scales");
  STD_TORCH_CHECK(x.size(1) % count == 0, "x: expected a multiple of ", count, " channels, got ", x.size(1));
  AffinitySizes sizes{x.size(0), x.size(1) / count, 0, 0};
  for (int64_t s : scales) {
    STD_TORCH_CHECK(s >= 1 && s <= MAX_AFFINITY_SCALE, "scales: expected scales of 1 to ", MAX_AFFINITY_SCALE);
    sizes.rows += s * s, sizes.pairs += s * s * s * s;
  }
  check_small(weight, "weight", x, {sizes.rows, sizes.channels});
  check_small(bias, "bias", x, {sizes.batch, sizes.rows});
  return sizes;
}
