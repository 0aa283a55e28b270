// The CPU library: schemas and registrations. Raw operators that write into tensors they are given;
// apc_kernels/ops/ wraps them into the public ones.
#include "common/isa.h"
#include "common/tensor.h"
#include "pyramid_pool/operators.h"

namespace {
std::string instruction_set() { return isa_name(); }
}  // namespace

STABLE_TORCH_LIBRARY(apc_kernels_cpp, library) {
  library.def("instruction_set() -> str");
  library.def("pyramid_pool(Tensor x, int[] scales, Tensor(a!) out) -> ()");
  library.def("pyramid_pool_backward(Tensor grad, int[] scales, Tensor(a!) grad_x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(apc_kernels_cpp, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(apc_kernels_cpp, CPU, library) {
  library.impl("pyramid_pool", TORCH_BOX(&pyramid_pool));
  library.impl("pyramid_pool_backward", TORCH_BOX(&pyramid_pool_backward));
}
