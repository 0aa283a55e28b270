// adaptive_context_norm's small tensors on the CPU: the operators, which describe the work to the kernels. Each writes
// into the tensors it is given last (apc_kernels/ops/affinities/phases.py says what).
#include "context_norm.h"

#include <algorithm>
#include <memory>

#include "../common/run.h"
#include "operators.h"

namespace {

// `images` has one row for each image. `weight` (rows, C) has the small tensors' dtype, for which it stands below.
ContextNorm describe(const Tensor& images, const Tensor& weight, const Scales& scales) {
  const int64_t count = static_cast<int64_t>(scales.size());
  STD_TORCH_CHECK(count >= 1 && count <= MAX_AFFINITY_SCALES, "scales: expected 1 to ", MAX_AFFINITY_SCALES, " scales");
  check_dimensions(weight, "weight", 2);
  STD_TORCH_CHECK(images.dim() >= 1 && images.size(0) >= 1 && weight.size(1) >= 1, "expected images and channels");
  ContextNorm p{};
  p.scalar = scalar_of(weight, "weight");
  p.batch = images.size(0), p.channels = weight.size(1);
  p.num_scales = static_cast<int>(count), p.scales = scales.data();
  for (int64_t s : scales) {
    STD_TORCH_CHECK(s >= 1 && s <= MAX_AFFINITY_SCALE, "scales: expected scales of 1 to ", MAX_AFFINITY_SCALE);
    p.rows += s * s, p.pairs += s * s * s * s;
    p.most_regions = std::max(p.most_regions, s * s);
  }
  return p;
}

int64_t all(const ContextNorm& p) { return p.num_scales * p.channels; }
int64_t units(const ContextNorm& p) { return p.num_scales * parts_of(p); }

void take_norm(ContextNorm& p, const Tensor& statistics, const Tensor& gamma, const MaybeTensor& beta, double eps,
               const Tensor& weight) {
  p.eps = eps;
  take(p.statistics, statistics, "statistics", weight, {2, all(p)}, true);
  take(p.gamma, gamma, "gamma", weight, {all(p)});
  take(p.beta, beta, "beta", weight, {all(p)});
}

void take_sums(ContextNorm& p, const Tensor& sums, const Tensor& grad_gamma, const Tensor& grad_beta,
               const Tensor& weight) {
  take(p.sums, sums, "sums", weight, {2, all(p)}, true);
  take(p.grad_gamma, grad_gamma, "grad_gamma", weight, {all(p)});
  take(p.grad_beta, grad_beta, "grad_beta", weight, {all(p)});
}

void take_products(ContextNorm& p, const Tensor& vectors, const Tensor& mean, const Tensor& weight) {
  take(p.vectors, vectors, "vectors", weight, {p.batch, p.rows, p.channels}, true);
  take(p.mean, mean, "mean", weight, {p.batch, p.rows}, true);
}

void take_grads(ContextNorm& p, const Tensor& grad_rows, const Tensor& grad_shift, const Tensor& weight) {
  take(p.grad_rows, grad_rows, "grad_rows", weight, {p.batch, p.rows, p.channels});
  take(p.grad_shift, grad_shift, "grad_shift", weight, {p.batch, all(p)});
}

void guide_statistics(const Tensor& pooled, const Tensor& guide, const Scales& scales, const Tensor& features,
                      const Tensor& statistics) {
  ContextNorm p = describe(pooled, guide, scales);
  take(p.pooled, pooled, "pooled", guide, {p.batch, all(p)});
  take(p.guide, guide, "guide", guide, {all(p), p.channels});
  take(p.features, features, "features", guide, {p.batch, all(p)}, true);
  take(p.statistics, statistics, "statistics", guide, {2, all(p)}, true);
  run(::guide_statistics, p, units(p));
}

void guide_biases(const Tensor& features, const Tensor& statistics, const Tensor& gamma, const Tensor& beta, double eps,
                  const Tensor& weight, const Tensor& bias, const Scales& scales, const Tensor& biases) {
  ContextNorm p = describe(features, weight, scales);
  take_norm(p, statistics, gamma, beta, eps, weight);
  take(p.features, features, "features", weight, {p.batch, all(p)}, true);
  take(p.weight, weight, "weight", weight, {p.rows, p.channels});
  take(p.bias, bias, "bias", weight, {p.rows});
  take(p.biases, biases, "biases", weight, {p.batch, p.rows});
  run(::guide_biases, p, p.batch * p.num_scales);
}

void project(const Tensor& regions, const Tensor& projection, const Scales& scales, const Tensor& vectors) {
  ContextNorm p = describe(regions, projection, scales);
  take(p.regions, regions, "regions", projection, {p.batch, p.rows, p.channels});
  take(p.projection, projection, "projection", projection, {all(p), p.channels});
  take(p.vectors, vectors, "vectors", projection, {p.batch, p.rows, p.channels}, true);
  run(::project, p, units(p));
}

void product_statistics(const Tensor& vectors, const Tensor& mean, const Tensor& covariance, const Tensor& weight,
                        const Scales& scales, const Tensor& statistics) {
  ContextNorm p = describe(vectors, weight, scales);
  take(p.covariance, covariance, "covariance", weight, {p.batch, p.pairs}, true);
  take_products(p, vectors, mean, weight);
  take(p.statistics, statistics, "statistics", weight, {2, all(p)}, true);
  run(::product_statistics, p, units(p));
}

void product_norm(const Tensor& vectors, const Tensor& statistics, const Tensor& gamma, const Tensor& beta, double eps,
                  const Tensor& mean, const Tensor& weight, const Scales& scales, const Tensor& rows,
                  const Tensor& shift, const Tensor& center) {
  ContextNorm p = describe(vectors, weight, scales);
  take_norm(p, statistics, gamma, beta, eps, weight);
  take_products(p, vectors, mean, weight);
  take(p.norm_rows, rows, "rows", weight, {p.batch, p.rows, p.channels});
  take(p.shift, shift, "shift", weight, {p.batch, all(p)});
  take(p.center, center, "center", weight, {p.batch, p.rows});
  run(::product_norm, p, units(p));
}

void product_norm_sums(const Tensor& grad_rows, const Tensor& grad_shift, const Tensor& vectors,
                       const Tensor& statistics, const Tensor& gamma, double eps, const Tensor& mean,
                       const Tensor& weight, const Scales& scales, const Tensor& sums, const Tensor& grad_gamma,
                       const Tensor& grad_beta) {
  ContextNorm p = describe(vectors, weight, scales);
  take_grads(p, grad_rows, grad_shift, weight);
  take_products(p, vectors, mean, weight);
  take_norm(p, statistics, gamma, {}, eps, weight);
  take_sums(p, sums, grad_gamma, grad_beta, weight);
  run(::product_norm_sums, p, units(p));
}

void product_norm_gradients(const Tensor& grad_rows, const Tensor& grad_shift, const Tensor& vectors,
                            const Tensor& statistics, const Tensor& sums, const Tensor& gamma, double eps,
                            const Tensor& mean, const Tensor& covariance, const Tensor& regions,
                            const Tensor& projection, int64_t positions, const Scales& scales,
                            const Tensor& grad_regions, const Tensor& grad_projection, const Tensor& linear,
                            const Tensor& quadratic) {
  ContextNorm p = describe(vectors, projection, scales);
  take_grads(p, grad_rows, grad_shift, projection);
  take_products(p, vectors, mean, projection);
  take_norm(p, statistics, gamma, {}, eps, projection);
  take(p.sums, sums, "sums", projection, {2, all(p)}, true);
  take(p.covariance, covariance, "covariance", projection, {p.batch, p.pairs}, true);
  take(p.regions, regions, "regions", projection, {p.batch, p.rows, p.channels});
  take(p.projection, projection, "projection", projection, {all(p), p.channels});
  take(p.grad_regions, grad_regions, "grad_regions", projection, {p.batch, p.rows, p.channels});
  take(p.grad_projection, grad_projection, "grad_projection", projection, {all(p), p.channels});
  take(p.linear, linear, "linear", projection, {p.batch, p.rows});
  take(p.quadratic, quadratic, "quadratic", projection, {p.batch, p.pairs});
  p.positions = positions;
  const std::unique_ptr<double[]> grad_vectors(new double[p.batch * p.rows * p.channels]);
  p.grad_vectors = grad_vectors.get();
  run(vector_gradients, p, units(p));
  run(region_gradients, p, units(p));
  run(moment_gradients, p, p.batch * p.num_scales);
}

void guide_sums(const Tensor& grad_bias, const Tensor& slope, const Tensor& slope_moments, const Tensor& linear,
                const Tensor& quadratic, const Tensor& features, const Tensor& statistics, const Tensor& gamma,
                const Tensor& beta, double eps, const Tensor& weight, const Scales& scales, const Tensor& through,
                const Tensor& sums, const Tensor& grad_weight, const Tensor& grad_gamma, const Tensor& grad_beta) {
  ContextNorm p = describe(features, weight, scales);
  take(p.grad_bias, grad_bias, "grad_bias", weight, {p.batch, p.rows});
  take(p.slope, slope, "slope", weight, {p.batch, p.rows});
  take(p.slope_moments, slope_moments, "slope_moments", weight, {p.batch, p.pairs});
  take(p.linear, linear, "linear", weight, {p.batch, p.rows});
  take(p.quadratic, quadratic, "quadratic", weight, {p.batch, p.pairs});
  take(p.features, features, "features", weight, {p.batch, all(p)}, true);
  take_norm(p, statistics, gamma, beta, eps, weight);
  take(p.weight, weight, "weight", weight, {p.rows, p.channels});
  take(p.through, through, "through", weight, {p.batch, all(p)}, true);
  take(p.grad_weight, grad_weight, "grad_weight", weight, {p.rows, p.channels});
  take_sums(p, sums, grad_gamma, grad_beta, weight);
  run(::guide_sums, p, units(p));
}

void guide_gradients(const Tensor& through, const Tensor& features, const Tensor& statistics, const Tensor& sums,
                     const Tensor& gamma, double eps, const Tensor& pooled, const Tensor& guide, int64_t positions,
                     const Scales& scales, const Tensor& constant, const Tensor& grad_guide) {
  ContextNorm p = describe(features, guide, scales);
  take(p.through, through, "through", guide, {p.batch, all(p)}, true);
  take(p.features, features, "features", guide, {p.batch, all(p)}, true);
  take_norm(p, statistics, gamma, {}, eps, guide);
  take(p.sums, sums, "sums", guide, {2, all(p)}, true);
  take(p.pooled, pooled, "pooled", guide, {p.batch, all(p)});
  take(p.guide, guide, "guide", guide, {all(p), p.channels});
  take(p.constant, constant, "constant", guide, {p.batch, all(p)});
  take(p.grad_guide, grad_guide, "grad_guide", guide, {all(p), p.channels});
  p.positions = positions;
  run(::guide_gradients, p, units(p));
}

constexpr Operator OPERATORS[] = {
    {"guide_statistics(Tensor pooled, Tensor guide, int[] scales, Tensor(a!) features, Tensor(b!) statistics) -> ()",
     TORCH_BOX(&guide_statistics)},
    {"guide_biases(Tensor features, Tensor statistics, Tensor gamma, Tensor beta, float eps, Tensor weight, "
     "Tensor bias, int[] scales, Tensor(a!) biases) -> ()",
     TORCH_BOX(&guide_biases)},
    {"project(Tensor regions, Tensor projection, int[] scales, Tensor(a!) vectors) -> ()", TORCH_BOX(&project)},
    {"product_statistics(Tensor vectors, Tensor mean, Tensor covariance, Tensor weight, int[] scales, "
     "Tensor(a!) statistics) -> ()",
     TORCH_BOX(&product_statistics)},
    {"product_norm(Tensor vectors, Tensor statistics, Tensor gamma, Tensor beta, float eps, Tensor mean, "
     "Tensor weight, int[] scales, Tensor(a!) rows, Tensor(b!) shift, Tensor(c!) center) -> ()",
     TORCH_BOX(&product_norm)},
    {"product_norm_sums(Tensor grad_rows, Tensor grad_shift, Tensor vectors, Tensor statistics, Tensor gamma, "
     "float eps, Tensor mean, Tensor weight, int[] scales, Tensor(a!) sums, Tensor(b!) grad_gamma, "
     "Tensor(c!) grad_beta) -> ()",
     TORCH_BOX(&product_norm_sums)},
    {"product_norm_gradients(Tensor grad_rows, Tensor grad_shift, Tensor vectors, Tensor statistics, Tensor sums, "
     "Tensor gamma, float eps, Tensor mean, Tensor covariance, Tensor regions, Tensor projection, int positions, "
     "int[] scales, Tensor(a!) grad_regions, Tensor(b!) grad_projection, Tensor(c!) linear, Tensor(d!) quadratic) "
     "-> ()",
     TORCH_BOX(&product_norm_gradients)},
    {"guide_sums(Tensor grad_bias, Tensor slope, Tensor slope_moments, Tensor linear, Tensor quadratic, "
     "Tensor features, Tensor statistics, Tensor gamma, Tensor beta, float eps, Tensor weight, int[] scales, "
     "Tensor(a!) through, Tensor(b!) sums, Tensor(c!) grad_weight, Tensor(d!) grad_gamma, Tensor(e!) grad_beta) -> ()",
     TORCH_BOX(&guide_sums)},
    {"guide_gradients(Tensor through, Tensor features, Tensor statistics, Tensor sums, Tensor gamma, float eps, "
     "Tensor pooled, Tensor guide, int positions, int[] scales, Tensor(a!) constant, Tensor(b!) grad_guide) -> ()",
     TORCH_BOX(&guide_gradients)},
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, OPERATORS)
