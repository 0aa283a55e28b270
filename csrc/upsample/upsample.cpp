// upsample_*'s operators on the CPU: check, describe the work, share it out among torch's threads. Each writes into the
// tensors it is given last (apc_kernels/ops/upsample/reference.py says what).
#include "upsample.h"

#include <algorithm>
#include <memory>

#include "../common/run.h"

namespace {

constexpr int64_t MAX_EXTENT = 1 << 30;
constexpr int64_t MAX_COUNTED = 46339;  // classes whose pairs an int32 counts

Map describe_map(const Tensor& map) {
  Map m = map_of(map);
  if (m.width == 1) m.stride_x = 1;  // the stride of a single column says nothing
  return m;
}

Upsample describe(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.numel() > 0, "logits: expected four dimensions, none of them empty");
  check_layout(logits, "logits");
  for (int64_t extent : {logits.size(1), logits.size(2), logits.size(3), height, width})
    STD_TORCH_CHECK(extent >= 1 && extent < MAX_EXTENT, "expected classes, heights and widths of 1 to ", MAX_EXTENT - 1,
                    ", got ", extent);
  return {scalar_of(logits, "logits"),
          logits.size(0),
          logits.size(1),
          Axis(logits.size(2), height, align_corners),
          Axis(logits.size(3), width, align_corners),
          describe_map(logits)};
}

Labels describe_labels(const Tensor& labels, const char* name, const Tensor& logits, bool masks = false) {
  STD_TORCH_CHECK(
      labels.dim() == 3 + masks && labels.size(0) == logits.size(0) && (!masks || labels.size(1) == logits.size(1)),
      name, ": expected (B, H, W), or masks (B, K, H, W)");
  check_device(labels, name, logits, "logits");
  check_contiguous(labels, name);
  switch (labels.scalar_type()) {
    case ScalarType::Byte: return {LabelType::uint8, labels.data_ptr()};
    case ScalarType::Short: return {LabelType::int16, labels.data_ptr()};
    case ScalarType::Int: return {LabelType::int32, labels.data_ptr()};
    case ScalarType::Long: return {LabelType::int64, labels.data_ptr()};
    default: STD_TORCH_CHECK(false, name, ": expected uint8, int16, int32 or int64");
  }
}

Shape pixels(const Upsample& u) { return {u.batch, u.rows.size, u.columns.size}; }
int64_t groups(const Upsample& u) { return u.batch * u.rows.source; }

// Two bands for each thread, of 4 rows at least: of its groups a band shares one with the band above it.
int64_t bands_of(const Upsample& u) {
  const int64_t wanted = 2 * torch::stable::get_num_threads(), most = std::max<int64_t>(1, u.rows.source / 4);
  return std::clamp<int64_t>((wanted + u.batch - 1) / u.batch, 1, most);
}

CrossEntropy describe_cross_entropy(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                                    int64_t ignore_index, double label_smoothing, double focal, bool align_corners,
                                    const Tensor& normalizer) {
  STD_TORCH_CHECK(target.dim() == 3, "target: expected (B, H, W)");
  CrossEntropy p{describe(logits, target.size(1), target.size(2), align_corners),
                 describe_labels(target, "target", logits)};
  STD_TORCH_CHECK(focal == 0 || label_smoothing == 0, "focal: expected 0 beside label_smoothing");
  p.ignore_index = ignore_index, p.label_smoothing = label_smoothing, p.focal = focal;
  take(p.weight, weight, "weight", logits, {p.classes});
  take(p.normalizer, normalizer, "normalizer", logits, pixels(p));
  return p;
}

void upsample_cross_entropy(const Tensor& logits, const Tensor& target, const MaybeTensor& weight, int64_t ignore_index,
                            double label_smoothing, double focal, bool align_corners, bool per_pixel,
                            const Tensor& normalizer, const Tensor& losses, const Tensor& sums) {
  CrossEntropy p =
      describe_cross_entropy(logits, target, weight, ignore_index, label_smoothing, focal, align_corners, normalizer);
  if (per_pixel) take(p.losses, losses, "losses", logits, pixels(p));
  double* total;
  take(total, sums, "sums", logits, {4}, true);
  const std::unique_ptr<double[]> totals(new double[4 * groups(p)]());
  p.sums = totals.get();
  run(cross_entropy_groups, p, groups(p));
  std::fill(total, total + 4, 0.0);
  for (int64_t i = 0; i < 4 * groups(p); ++i) total[i % 4] += totals[i];
}

void upsample_cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                     const MaybeTensor& weight, int64_t ignore_index, double label_smoothing,
                                     double focal, bool align_corners, const Tensor& normalizer,
                                     const Tensor& grad_logits) {
  CrossEntropy p =
      describe_cross_entropy(logits, target, weight, ignore_index, label_smoothing, focal, align_corners, normalizer);
  p.grad_is_scalar = grad.dim() == 1;
  take(p.grad, grad, "grad", logits, p.grad_is_scalar ? Shape{1} : pixels(p));
  check_map_like(grad_logits, "grad_logits", logits, "logits");
  p.grad_logits = describe_map(grad_logits);
  p.bands = bands_of(p);
  run(cross_entropy_backward_bands, p, p.batch * p.bands);
}

RegionSums describe_region_sums(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                                int64_t ignore_index, bool sigmoid, bool align_corners) {
  const bool masks = target.dim() == 4;
  STD_TORCH_CHECK(masks ? sigmoid : target.dim() == 3, "target: expected (B, H, W), or for sigmoid (B, K, H, W)");
  RegionSums p{describe(logits, target.size(1 + masks), target.size(2 + masks), align_corners),
               describe_labels(target, "target", logits, masks), masks, sigmoid, ignore_index};
  take(p.weight, weight, "weight", logits, {p.classes});
  return p;
}

template <typename A>
void add_region_sums(const RegionSums& p, A* sums, int64_t* wrong) {
  *wrong = 0;
  for (int64_t image = 0; image < p.batch; ++image) {
    const int64_t first = image * p.rows.source, last = first + p.rows.source;
    for (int64_t unit = first; unit < last; ++unit) *wrong += p.wrong[unit];
    for (int64_t i = 0; i < 4 * p.classes; ++i) {
      double sum = 0;
      for (int64_t unit = first; unit < last; ++unit) sum += p.sums[unit * 4 * p.classes + i];
      sums[(i % 4 * p.batch + image) * p.classes + i / 4] = static_cast<A>(sum);
    }
  }
}

void upsample_region_sums(const Tensor& logits, const Tensor& target, const MaybeTensor& weight, int64_t ignore_index,
                          bool sigmoid, bool align_corners, const Tensor& sums, const Tensor& wrong) {
  RegionSums p = describe_region_sums(logits, target, weight, ignore_index, sigmoid, align_corners);
  void* result;
  take(result, sums, "sums", logits, {4, p.batch, p.classes});
  STD_TORCH_CHECK(wrong.numel() == 1 && wrong.scalar_type() == ScalarType::Long && wrong.device() == logits.device(),
                  "wrong: expected one int64 beside the logits");
  const std::unique_ptr<double[]> of_units(new double[4 * p.classes * groups(p)]());
  const std::unique_ptr<int64_t[]> wrong_of_units(new int64_t[groups(p)]());
  p.sums = of_units.get(), p.wrong = wrong_of_units.get();
  run(region_sums_groups, p, groups(p));
  int64_t* total = static_cast<int64_t*>(wrong.data_ptr());
  if (p.scalar == Scalar::float64)
    add_region_sums(p, static_cast<double*>(result), total);
  else
    add_region_sums(p, static_cast<float*>(result), total);
}

void upsample_region_sums_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                   const MaybeTensor& weight, int64_t ignore_index, bool sigmoid, bool align_corners,
                                   const Tensor& grad_logits) {
  RegionSums p = describe_region_sums(logits, target, weight, ignore_index, sigmoid, align_corners);
  take(p.grad, grad, "grad", logits, {4, p.batch, p.classes});
  check_map_like(grad_logits, "grad_logits", logits, "logits");
  p.grad_logits = describe_map(grad_logits);
  p.bands = bands_of(p);
  run(region_sums_backward_bands, p, p.batch * p.bands);
}

void upsample_argmax(const Tensor& logits, const Shape& size, bool align_corners, const Tensor& labels) {
  STD_TORCH_CHECK(size.size() == 2, "size: expected two numbers");
  check_shape(labels, "labels", {logits.size(0), size[0], size[1]});
  const Argmax p{describe(logits, size[0], size[1], align_corners), describe_labels(labels, "labels", logits)};
  const int bits = 8 * static_cast<int>(labels.element_size()) - (p.labels.type != LabelType::uint8);
  STD_TORCH_CHECK(bits >= 31 || p.classes <= int64_t(1) << bits, "labels: too narrow for the classes");
  run(argmax_groups, p, groups(p));
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
  std::fill(p.counts, p.counts + p.classes * p.classes, 0);
  *p.invalid = 0;
  run(confusion_groups, p, groups(p));
}

void upsample_softmax(const Tensor& logits, bool flip, bool align_corners, bool add, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 4, "out: expected four dimensions");
  const Softmax p{describe(logits, out.size(2), out.size(3), align_corners), flip, add, describe_map(out)};
  check_shape(out, "out", {p.batch, p.classes, out.size(2), out.size(3)});
  STD_TORCH_CHECK(out.scalar_type() == (p.scalar == Scalar::float64 ? ScalarType::Double : ScalarType::Float) &&
                      out.device() == logits.device(),
                  "out: expected float32 (float64 beside float64) on the logits' device");
  check_layout(out, "out");
  if (!add) request_huge_pages(out);
  run(softmax_groups, p, groups(p));
}

constexpr Operator OPERATORS[] = {
    {"upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
     "float focal, bool align_corners, bool per_pixel, Tensor(a!) normalizer, Tensor(b!) losses, Tensor(c!) sums) -> "
     "()",
     TORCH_BOX(&upsample_cross_entropy)},
    {"upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
     "float label_smoothing, float focal, bool align_corners, Tensor normalizer, Tensor(a!) grad_logits) -> ()",
     TORCH_BOX(&upsample_cross_entropy_backward)},
    {"upsample_region_sums(Tensor logits, Tensor target, Tensor? weight, int ignore_index, bool sigmoid, "
     "bool align_corners, Tensor(a!) sums, Tensor(b!) wrong) -> ()",
     TORCH_BOX(&upsample_region_sums)},
    {"upsample_region_sums_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
     "bool sigmoid, bool align_corners, Tensor(a!) grad_logits) -> ()",
     TORCH_BOX(&upsample_region_sums_backward)},
    {"upsample_argmax(Tensor logits, int[] size, bool align_corners, Tensor(a!) labels) -> ()",
     TORCH_BOX(&upsample_argmax)},
    {"upsample_confusion(Tensor logits, Tensor target, int ignore_index, bool align_corners, Tensor(a!) counts, "
     "Tensor(b!) invalid) -> ()",
     TORCH_BOX(&upsample_confusion)},
    {"upsample_softmax(Tensor logits, bool flip, bool align_corners, bool add, Tensor(a!) out) -> ()",
     TORCH_BOX(&upsample_softmax)},
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, OPERATORS)
