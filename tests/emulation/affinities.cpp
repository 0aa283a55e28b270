// The CUDA kernels on affinities without a GPU: numpy arrays into parameters.
#include <optional>

#include "../../csrc/affinities/affinities_cuda.h"
#include "arrays.h"
#include "launches.h"

namespace {

using MaybeArray = std::optional<py::array>;
using Scales = std::vector<int64_t>;

const float* floats(const MaybeArray& array) { return array ? static_cast<const float*>(array->data()) : nullptr; }
float* floats(py::array& array) { return static_cast<float*>(array.mutable_data()); }
double* doubles(py::array& array) { return static_cast<double*>(array.mutable_data()); }

MapCuda describe_map(py::array& map) {
  return describe_map_cuda(sizes(map).data(), element_strides(map).data(), map.mutable_data());
}

template <typename Params>
Params describe(py::array& x, const py::array& weight, const py::array& bias, const Scales& scales, int target_blocks) {
  Params p{};
  describe_affinities_cuda(p, sizes(x).data(), element_strides(x).data(), scales, x.mutable_data(), x.itemsize(),
                           target_blocks);
  p.weight = floats(weight), p.bias = floats(bias);
  return p;
}

AdaptiveContextCuda describe_context(py::array& x, const py::array& weight, const py::array& bias, const Scales& scales,
                                     const MaybeArray& regions, const MaybeArray& shift, const MaybeArray& center,
                                     int target_blocks) {
  auto p = describe<AdaptiveContextCuda>(x, weight, bias, scales, target_blocks);
  p.regions = floats(regions), p.shift = floats(shift), p.center = floats(center);
  return p;
}

void context(py::array x, const std::string& dtype, py::array regions, py::array weight, py::array bias, Scales scales,
             MaybeArray shift, bool residual, MaybeArray center, py::array z, uint32_t seed) {
  AdaptiveContextCuda p = describe_context(x, weight, bias, scales, regions, shift, center, 0);
  p.residual = residual;
  p.z = describe_map(z);
  run_adaptive_context(p, dtype, seed);
}

void context_backward_regions(py::array grad, py::array x, const std::string& dtype, py::array regions,
                              py::array weight, py::array bias, Scales scales, MaybeArray shift, MaybeArray center,
                              py::array grad_regions, py::array grad_shift, py::array grad_bias, py::array slope,
                              py::array slope_moments, int target_blocks, uint32_t seed) {
  AdaptiveContextCuda p = describe_context(x, weight, bias, scales, regions, shift, center, target_blocks);
  p.grad = describe_map(grad);
  p.grad_regions = floats(grad_regions), p.grad_shift = floats(grad_shift), p.grad_bias = floats(grad_bias);
  p.slope = floats(slope), p.slope_moments = floats(slope_moments);
  run_region_gradients(p, dtype, seed);
}

void context_backward_x(MaybeArray grad, py::array x, const std::string& dtype, MaybeArray regions, py::array weight,
                        py::array bias, Scales scales, MaybeArray shift, bool residual, MaybeArray center,
                        MaybeArray linear, MaybeArray quadratic, MaybeArray constant, py::array grad_x,
                        py::array grad_weight, py::array grad_bias, int target_blocks, uint32_t seed) {
  AdaptiveContextCuda p = describe_context(x, weight, bias, scales, regions, shift, center, target_blocks);
  p.residual = residual;
  if (grad) p.grad = describe_map(*grad);
  p.linear = floats(linear), p.quadratic = floats(quadratic), p.constant = floats(constant);
  p.grad_x = describe_map(grad_x);
  p.grad_weight = floats(grad_weight), p.grad_bias = floats(grad_bias);
  run_x_gradients(p, dtype, seed);
}

void moments(py::array x, const std::string& dtype, py::array weight, py::array bias, Scales scales, py::array mean,
             py::array covariance, int target_blocks, uint32_t seed) {
  auto p = describe<AffinityMomentsCuda>(x, weight, bias, scales, target_blocks);
  p.mean = doubles(mean), p.covariance = doubles(covariance);
  run_affinity_moments(p, dtype, seed);
}

}  // namespace

void bind_affinities(py::module_& m) {
  m.def("adaptive_context", context);
  m.def("adaptive_context_backward_regions", context_backward_regions);
  m.def("adaptive_context_backward_x", context_backward_x);
  m.def("affinity_moments", moments);
}
