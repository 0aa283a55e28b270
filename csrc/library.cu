// The CUDA library: schemas and registrations, those of library.cpp under a namespace of their own.
#include "pyramid_pool/operators.h"

STABLE_TORCH_LIBRARY(apc_kernels_cuda, library) {
  library.def("pyramid_pool(Tensor x, int[] scales, Tensor(a!) out) -> ()");
  library.def("pyramid_pool_backward(Tensor grad, int[] scales, Tensor(a!) grad_x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(apc_kernels_cuda, CUDA, library) {
  library.impl("pyramid_pool", TORCH_BOX(&pyramid_pool_cuda));
  library.impl("pyramid_pool_backward", TORCH_BOX(&pyramid_pool_backward_cuda));
}
