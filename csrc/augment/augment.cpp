// augment's operator on the CPU: checks, describes the work, shares it out among torch's threads.
#include "augment.h"

#include "../common/run.h"

namespace {

// Enough pixels for a thread to be worth waking; a line of the image is read twice where two threads meet.
constexpr int64_t GRAIN = 65536;

// kinds, values: of the steps; mean, std: three numbers each, or none where `out` is uint8.
void augment(const Tensor& image, const std::vector<int64_t>& size, const std::vector<int64_t>& window, bool flip,
             const std::vector<int64_t>& kinds, const std::vector<double>& values, const std::vector<double>& mean,
             const std::vector<double>& std, const Tensor& out) {
  STD_TORCH_CHECK(size.size() == 2 && window.size() == 4, "size, window: expected two and four numbers");
  STD_TORCH_CHECK(image.scalar_type() == ScalarType::Byte && image.dim() == 3, "image: expected (3, H, W) in uint8");
  check_shape(image, "image", {3, image.size(1), image.size(2)});
  constexpr int64_t MOST = int64_t(1) << 29;  // pixels along an axis, so that an int counts a row's bytes
  for (int64_t length : {image.size(1), image.size(2), size[0], size[1]})
    STD_TORCH_CHECK(length >= 1 && length < MOST, "image, size: expected 1 to ", MOST - 1, ", got ", length);
  for (int axis = 0; axis < 2; ++axis)
    STD_TORCH_CHECK(window[axis] >= 0 && window[axis + 2] >= 1 && window[axis + 2] <= size[axis] - window[axis],
                    "window: expected a part of the resized image");
  STD_TORCH_CHECK(kinds.size() == values.size(), "kinds, values: expected as many of either");
  for (int64_t kind : kinds) STD_TORCH_CHECK(kind >= 0 && kind <= 3, "kinds: expected 0 to 3, got ", kind);
  STD_TORCH_CHECK(mean.size() == std.size() && (mean.size() == 3 || mean.empty()), "mean, std: expected 3 numbers");
  check_shape(out, "out", {3, window[2], window[3]});
  STD_TORCH_CHECK(out.scalar_type() == (mean.empty() ? ScalarType::Byte : ScalarType::Float) && out.is_contiguous(),
                  "out: expected a contiguous tensor, uint8, or float32 beside mean and std");

  std::vector<AugmentStep> steps;
  for (size_t i = 0; i < kinds.size(); ++i)
    steps.push_back({static_cast<AugmentStep::Kind>(kinds[i]), static_cast<float>(values[i])});
  Augment p{};
  p.image = static_cast<const uint8_t*>(image.data_ptr());
  p.stride_c = image.stride(0), p.stride_y = image.stride(1), p.stride_x = image.stride(2);
  p.rows = Axis(image.size(1), size[0], false), p.columns = Axis(image.size(2), size[1], false);
  p.top = window[0], p.left = window[1], p.height = window[2], p.width = window[3];
  p.flip = flip, p.is_normalised = !mean.empty();
  p.steps = steps.data(), p.step_count = static_cast<int64_t>(steps.size());
  p.out = out.data_ptr();
  for (size_t c = 0; c < mean.size(); ++c)
    p.mean[c] = static_cast<float>(mean[c]), p.scale[c] = static_cast<float>(1 / std[c]);
  request_huge_pages(out);
  run(augment_rows, p, p.height, (GRAIN + p.width - 1) / p.width);
}

constexpr Operator OPERATORS[] = {
    {"augment(Tensor image, int[] size, int[] window, bool flip, int[] kinds, float[] values, float[] mean, "
     "float[] std, Tensor(a!) out) -> ()",
     TORCH_BOX(&augment)},
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, OPERATORS)
