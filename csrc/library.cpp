// The CPU library: schemas and registrations. Raw operators that write into tensors they are given;
// apc_kernels/ops/ wraps them into the public ones.
#include "adaptive_context/operators.h"
#include "augment/operators.h"
#include "common/isa.h"
#include "common/tensor.h"
#include "conv3x3/operators.h"
#include "pyramid_pool/operators.h"
#include "upsample/operators.h"

namespace {
std::string instruction_set() { return isa_name(); }
}  // namespace

STABLE_TORCH_LIBRARY(apc_kernels_cpp, library) {
  library.def("instruction_set() -> str");
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
  library.def(
      "augment(Tensor image, int[] size, int[] window, bool flip, int[] kinds, float[] values, float[] mean, "
      "float[] std, Tensor(a!) out) -> ()");
  library.def(
      "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
      "bool align_corners, bool per_pixel, Tensor(a!) normalizer, Tensor(b!) losses, Tensor(c!) sums) -> ()");
  library.def(
      "upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
      "float label_smoothing, bool align_corners, Tensor normalizer, Tensor(a!) grad_logits) -> ()");
  library.def("upsample_argmax(Tensor logits, int[] size, bool align_corners, Tensor(a!) labels) -> ()");
  library.def(
      "upsample_confusion(Tensor logits, Tensor target, int ignore_index, bool align_corners, Tensor(a!) counts, "
      "Tensor(b!) invalid) -> ()");
  library.def("conv3x3_tiles(Tensor map, int first_row, bool of_result, Tensor(a!) tiles) -> ()");
  library.def("conv3x3(Tensor tiles, int first_row, Tensor(a!) map) -> ()");
  library.def("conv3x3_weight(Tensor weight, bool reversed, Tensor(a!) transformed) -> ()");
  library.def("upsample_softmax(Tensor logits, bool flip, bool align_corners, bool add, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(apc_kernels_cpp, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(apc_kernels_cpp, CPU, library) {
  library.impl("pyramid_pool", TORCH_BOX(&pyramid_pool));
  library.impl("pyramid_pool_backward", TORCH_BOX(&pyramid_pool_backward));
  library.impl("adaptive_context", TORCH_BOX(&adaptive_context));
  library.impl("adaptive_context_backward_regions", TORCH_BOX(&adaptive_context_backward_regions));
  library.impl("adaptive_context_backward_x", TORCH_BOX(&adaptive_context_backward_x));
  library.impl("affinity_moments", TORCH_BOX(&affinity_moments));
  library.impl("augment", TORCH_BOX(&augment));
  library.impl("upsample_cross_entropy", TORCH_BOX(&upsample_cross_entropy));
  library.impl("upsample_cross_entropy_backward", TORCH_BOX(&upsample_cross_entropy_backward));
  library.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
  library.impl("upsample_confusion", TORCH_BOX(&upsample_confusion));
  library.impl("conv3x3_tiles", TORCH_BOX(&conv3x3_tiles));
  library.impl("conv3x3", TORCH_BOX(&conv3x3));
  library.impl("conv3x3_weight", TORCH_BOX(&conv3x3_weight));
  library.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
}
