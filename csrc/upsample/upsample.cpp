// upsample_*'s operators on the CPU: check, describe the work, share it out among torch's threads.
#include "upsample.h"

#include <algorithm>
#include <memory>

#include "../common/pages.h"
#include "../common/scalar_of.h"
#include "operators.h"

namespace {

constexpr int64_t MAX_EXTENT = 1 << 30;
constexpr int64_t MAX_COUNTED = 46339;  // classes whose pairs an int32 counts

Logits view(const Tensor& map) {
  return {map.data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.size(3) == 1 ? 1 : map.stride(3)};
}

Upsample describe(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.numel() > 0, "logits: expected four dimensions, none of them empty");
  check_layout(logits, "logits");
  for (int64_t extent : {logits.size(1), logits.size(2), logits.size(3), height, width})
    STD_TORCH_CHECK(extent >= 1 && extent < MAX_EXTENT, "expected classes, heights and widths of 1 to ", MAX_EXTENT - 1,
                    ", got ", extent);
  isa();  // a wrong APC_KERNELS_ISA is reported from here, not from inside a thread
  return {scalar_of(logits, "logits"),
          logits.size(0),
          logits.size(1),
          Axis(logits.size(2), height, align_corners),
          Axis(logits.size(3), width, align_corners),
          view(logits)};
}

Labels describe_labels(const Tensor& labels, const char* name, const Tensor& logits) {
  STD_TORCH_CHECK(labels.dim() == 3 && labels.size(0) == logits.size(0), name, ": expected (B, H, W)");
  STD_TORCH_CHECK(labels.device() == logits.device(), name, " and logits are on different devices");
  STD_TORCH_CHECK(labels.is_contiguous(), name, ": expected a contiguous tensor");
  switch (labels.scalar_type()) {
    case ScalarType::Byte: return {LabelType::uint8, labels.data_ptr()};
    case ScalarType::Short: return {LabelType::int16, labels.data_ptr()};
    case ScalarType::Int: return {LabelType::int32, labels.data_ptr()};
    case ScalarType::Long: return {LabelType::int64, labels.data_ptr()};
    default: STD_TORCH_CHECK(false, name, ": expected uint8, int16, int32 or int64");
  }
}

CrossEntropy describe_cross_entropy(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                                    int64_t ignore_index, double label_smoothing, bool align_corners,
                                    const Tensor& normalizer) {
  STD_TORCH_CHECK(target.dim() == 3, "target: expected (B, H, W)");
  CrossEntropy p{.upsample = describe(logits, target.size(1), target.size(2), align_corners)};
  p.target = describe_labels(target, "target", logits);
  check_small(weight, "weight", logits, {logits.size(1)});
  check_small(normalizer, "normalizer", logits, {target.size(0), target.size(1), target.size(2)});
  p.weight = weight ? weight->data_ptr() : nullptr;
  p.ignore_index = ignore_index, p.label_smoothing = label_smoothing;
  p.normalizer = normalizer.data_ptr();
  return p;
}

int64_t groups(const Upsample& u) { return u.batch * u.rows.source; }

}  // namespace

void upsample_cross_entropy(const Tensor& logits, const Tensor& target, const MaybeTensor& weight, int64_t ignore_index,
                            double label_smoothing, bool align_corners, bool per_pixel, const Tensor& normalizer,
                            const Tensor& losses, const Tensor& sums) {
  CrossEntropy p =
      describe_cross_entropy(logits, target, weight, ignore_index, label_smoothing, align_corners, normalizer);
  if (per_pixel) check_small(losses, "losses", logits, {target.size(0), target.size(1), target.size(2)});
  check_small(sums, "sums", logits, {4}, true);
  p.losses = per_pixel ? losses.data_ptr() : nullptr;
  const std::unique_ptr<double[]> totals(new double[4 * groups(p.upsample)]());
  p.sums = totals.get();
  torch::stable::parallel_for(0, groups(p.upsample), 1, [&](int64_t begin, int64_t end) {
    APC_DISPATCH_ISA(cross_entropy_groups, p, begin, end);
  });
  double* total = static_cast<double*>(sums.data_ptr());
  std::fill(total, total + 4, 0.0);
  for (int64_t i = 0; i < 4 * groups(p.upsample); ++i) total[i % 4] += totals[i];
}

void upsample_cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                     const MaybeTensor& weight, int64_t ignore_index, double label_smoothing,
                                     bool align_corners, const Tensor& normalizer, const Tensor& grad_logits) {
  CrossEntropy p =
      describe_cross_entropy(logits, target, weight, ignore_index, label_smoothing, align_corners, normalizer);
  p.grad_is_scalar = grad.dim() == 1;
  if (p.grad_is_scalar)
    check_small(grad, "grad", logits, {1});
  else
    check_small(grad, "grad", logits, {target.size(0), target.size(1), target.size(2)});
  check_shape(grad_logits, "grad_logits", {logits.size(0), logits.size(1), logits.size(2), logits.size(3)});
  check_like(grad_logits, "grad_logits", logits, "logits");
  check_layout(grad_logits, "grad_logits");
  p.grad = grad.data_ptr(), p.grad_logits = view(grad_logits);
  // Two bands for each thread, of 4 rows at least: of its groups a band shares one with the band above it.
  const int64_t rows = p.upsample.rows.source, wanted = 2 * torch::stable::get_num_threads();
  p.bands = std::clamp<int64_t>((wanted + p.upsample.batch - 1) / p.upsample.batch, 1, std::max<int64_t>(1, rows / 4));
  torch::stable::parallel_for(0, p.upsample.batch * p.bands, 1, [&](int64_t begin, int64_t end) {
    APC_DISPATCH_ISA(cross_entropy_backward_bands, p, begin, end);
  });
}

void upsample_argmax(const Tensor& logits, const std::vector<int64_t>& size, bool align_corners, const Tensor& labels) {
  STD_TORCH_CHECK(size.size() == 2, "size: expected two numbers");
  check_shape(labels, "labels", {logits.size(0), size[0], size[1]});
  const Argmax p{describe(logits, size[0], size[1], align_corners), describe_labels(labels, "labels", logits)};
  const int bits = 8 * static_cast<int>(labels.element_size()) - (p.labels.type != LabelType::uint8);
  STD_TORCH_CHECK(bits >= 31 || p.upsample.classes <= int64_t(1) << bits, "labels: too narrow for the classes");
  torch::stable::parallel_for(0, groups(p.upsample), 1,
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(argmax_groups, p, begin, end); });
}

void upsample_confusion(const Tensor& logits, const Tensor& target, int64_t ignore_index, bool align_corners,
                        const Tensor& counts, const Tensor& invalid) {
  STD_TORCH_CHECK(target.dim() == 3, "target: expected (B, H, W)");
  const Upsample upsample = describe(logits, target.size(1), target.size(2), align_corners);
  STD_TORCH_CHECK(upsample.classes <= MAX_COUNTED, "logits: expected at most ", MAX_COUNTED, " classes");
  check_shape(counts, "counts", {upsample.classes, upsample.classes});
  check_shape(invalid, "invalid", {1});
  for (const Tensor& tensor : {counts, invalid})
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous() && tensor.device() == logits.device(),
        "counts, invalid: expected contiguous int64 beside the logits");
  const Confusion p{upsample, describe_labels(target, "target", logits), ignore_index,
                    static_cast<int64_t*>(counts.data_ptr()), static_cast<int64_t*>(invalid.data_ptr())};
  std::fill(p.counts, p.counts + upsample.classes * upsample.classes, 0);
  *p.invalid = 0;
  torch::stable::parallel_for(0, groups(upsample), 1,
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(confusion_groups, p, begin, end); });
}

void upsample_softmax(const Tensor& logits, bool flip, bool align_corners, bool add, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 4, "out: expected four dimensions");
  const Upsample upsample = describe(logits, out.size(2), out.size(3), align_corners);
  check_shape(out, "out", {logits.size(0), logits.size(1), out.size(2), out.size(3)});
  STD_TORCH_CHECK(out.scalar_type() == (upsample.scalar == Scalar::float64 ? ScalarType::Double : ScalarType::Float) &&
                      out.device() == logits.device(),
                  "out: expected float32 (float64 beside float64) on the logits' device");
  check_layout(out, "out");
  const Softmax p{upsample, flip, add, view(out)};
  if (!add) request_huge_pages(p.out.data, out.numel() * out.element_size());
  torch::stable::parallel_for(0, groups(upsample), 1,
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(softmax_groups, p, begin, end); });
}
