// affinity_moments' CUDA kernels on the emulation.
#include "../../csrc/affinity_moments/affinity_moments_launch.h"
#include "affinities.h"

namespace {

void forward(py::array x, const std::string& dtype, py::array weight, py::array bias, Scales scales, py::array mean,
             py::array covariance, int target_blocks, uint32_t seed) {
  auto p = describe_affinities<AffinityMomentsCuda>(x, weight, bias, scales, target_blocks);
  p.mean = static_cast<double*>(mean.mutable_data()), p.covariance = static_cast<double*>(covariance.mutable_data());
  with_workspace(p, dtype, [&](auto scalar) { launch_moments<decltype(scalar)>(p, emulation::Launch{seed}); });
}

}  // namespace

void bind_affinity_moments(py::module_& module) { module.def("affinity_moments", forward); }
