// affinity_moments' operator on the GPU.
#include "../common/affinities_cuda.h"
#include "affinity_moments_launch.h"

void affinity_moments_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales,
                           const Tensor& mean, const Tensor& covariance) {
  auto p = describe_affinities_cuda<AffinityMomentsCuda>(x, weight, bias, scales, CHUNKED_BLOCKS);
  check_small(mean, "mean", x, {p.batch, p.rows}, true);
  check_small(covariance, "covariance", x, {p.batch, p.pairs}, true);
  p.mean = static_cast<double*>(mean.data_ptr()), p.covariance = static_cast<double*>(covariance.data_ptr());
  const OnDevice device(x);
  const Tensor workspace = allocate_workspace(x, p);
  APC_DISPATCH_SCALAR(x, launch_moments, p, device);
}
