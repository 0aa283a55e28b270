// affinity_moments' operator on the CPU.
#include "affinity_moments.h"

#include <memory>

#include "../common/affinities_operator.h"

void affinity_moments(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales,
                      const Tensor& mean, const Tensor& covariance) {
  AffinityMoments p{};
  p.affinities = describe_affinities(x, weight, bias, scales);
  const Affinities& a = p.affinities;
  check_small(mean, "mean", x, {a.batch, a.rows}, true);
  check_small(covariance, "covariance", x, {a.batch, a.pairs}, true);
  const int64_t most = most_regions(a);
  p.unit_sums = most + most * padded(most);
  const std::unique_ptr<double[]> sums(new double[units(a) * p.unit_sums]);
  p.sums = sums.get();
  p.mean = static_cast<double*>(mean.data_ptr()), p.covariance = static_cast<double*>(covariance.data_ptr());
  torch::stable::parallel_for(0, units(a), 1,
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(sum_moments, p, begin, end); });
  torch::stable::parallel_for(0, a.batch * a.num_scales, 1,
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(merge_moments, p, begin, end); });
}
