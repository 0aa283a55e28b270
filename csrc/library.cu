// The CUDA library: schemas and registrations, those of library.cpp under a namespace of their own.
#include "adaptive_context/operators.h"
#include "pyramid_pool/operators.h"

STABLE_TORCH_LIBRARY(apc_kernels_cuda, library) {
  library.def("pyramid_pool(Tensor x, int[] scales, Tensor(a!) out) -> ()");
  library.def("pyramid_pool_backward(Tensor grad, int[] scales, Tensor(a!) grad_x) -> ()");
  library.def(
      "adaptive_context(Tensor x, Tensor regions, Tensor weight, Tensor bias, int[] scales, Tensor? shift, "
      "bool residual, Tensor? center, Tensor(a!) z) -> ()");
  library.def(
      "adaptive_context_backward_regions(Tensor grad, Tensor x, Tensor regions, Tensor weight, Tensor bias, "
      "int[] scales, Tensor? shift, Tensor? center, Tensor(a!) grad_regions, Tensor(b!) grad_shift, "
      "Tensor(c!) grad_bias, Tensor(d!) slope, Tensor(e!) slope_moments) -> ()");
  library.def(
      "adaptive_context_backward_x(Tensor? grad, Tensor x, Tensor? regions, Tensor weight, Tensor bias, int[] scales, "
      "Tensor? shift, bool residual, Tensor? center, Tensor? linear, Tensor? quadratic, Tensor? constant, "
      "Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias) -> ()");
  library.def(
      "affinity_moments(Tensor x, Tensor weight, Tensor bias, int[] scales, Tensor(a!) mean, Tensor(b!) covariance) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(apc_kernels_cuda, CUDA, library) {
  library.impl("pyramid_pool", TORCH_BOX(&pyramid_pool_cuda));
  library.impl("pyramid_pool_backward", TORCH_BOX(&pyramid_pool_backward_cuda));
  library.impl("adaptive_context", TORCH_BOX(&adaptive_context_cuda));
  library.impl("adaptive_context_backward_regions", TORCH_BOX(&adaptive_context_backward_regions_cuda));
  library.impl("adaptive_context_backward_x", TORCH_BOX(&adaptive_context_backward_x_cuda));
  library.impl("affinity_moments", TORCH_BOX(&affinity_moments_cuda));
}
