// pyramid_conv's operators on the CPU: check, describe the work, share it out among torch's threads. Each writes into
// the tensors it is given last.
#include "pyramid_conv.h"

#include <memory>

#include "../common/run.h"

namespace {

// The operands, and memory for what all units read or write.
struct Work {
  PyramidConv p{};
  std::unique_ptr<char[]> memory;

  // Numbers of as many parts as are asked for, in one piece of memory.
  void take_memory(std::initializer_list<std::pair<void**, int64_t>> parts) {
    const int64_t bytes = p.scalar == Scalar::float64 ? 8 : 4;
    int64_t all = 0;
    for (const auto& part : parts) all += part.second;
    memory.reset(new char[all * bytes]);
    char* next = memory.get();
    for (const auto& part : parts) *part.first = part.second > 0 ? next : nullptr, next += part.second * bytes;
  }
};

template <typename T>
void lay_out_columns(const PyramidConv& p, const T* columns, T* transposed, T* panels) {
  const int64_t width = padded(p.map.width);
  for (int64_t t = 0; t < p.taps; ++t)
    for (int64_t x = 0; x < width; ++x) transposed[t * width + x] = x < p.map.width ? columns[x * p.taps + t] : T(0);
  for (int64_t i = 0, first = 0; i < p.num_scales && panels != nullptr; first += p.scales[i++] * p.kernel) {
    const int64_t side = p.scales[i] * p.kernel;
    for (int64_t panel = 0; panel < padded(side); panel += REGION_PANEL)
      for (int64_t x = 0; x < p.map.width; ++x)
        for (int64_t t = panel; t < panel + REGION_PANEL; ++t)
          *panels++ = t < side ? columns[x * p.taps + first + t] : T(0);
  }
}

Work described(const Tensor& regions, const Tensor& weight, const Scales& scales, const Tensor& rows,
               const Tensor& columns, const Tensor& map, bool backward, bool of_weight) {
  check_dimensions(regions, "regions", 3);
  check_dimensions(weight, "weight", 4);
  check_dimensions(map, "map", 4);
  Work work;
  PyramidConv& p = work.p;
  p.scalar = scalar_of(regions, "regions");
  STD_TORCH_CHECK(p.scalar == Scalar::float32 || p.scalar == Scalar::float64, "regions: expected float32 or float64");
  p.batch = regions.size(0), p.channels = regions.size(1), p.rows = regions.size(2);
  p.num_scales = static_cast<int64_t>(scales.size()), p.scales = scales.data();
  p.outputs = weight.size(0), p.kernel = weight.size(2);
  int64_t all = 0;
  for (int64_t s : scales) {
    STD_TORCH_CHECK(s >= 1 && s <= MAX_SCALE, "scales: expected scales of 1 to ", MAX_SCALE);
    all += s * s, p.taps += s * p.kernel;
  }
  STD_TORCH_CHECK(p.num_scales <= MAX_SCALES, "scales: expected 1 to ", MAX_SCALES, " scales");
  STD_TORCH_CHECK(p.num_scales > 0 && all == p.rows, "regions: expected ", all, " regions, got ", p.rows);
  check_contiguous(regions, "regions");
  p.regions = regions.data_ptr();
  check_shape(weight, "weight", {p.outputs, p.num_scales * p.channels, p.kernel, p.kernel});
  check_like(weight, "weight", regions, "regions");
  p.weight = weight.data_ptr();
  p.weight_o = weight.stride(0), p.weight_c = weight.stride(1), p.weight_t = weight.stride(3);
  STD_TORCH_CHECK((weight.stride(2) == p.kernel * p.weight_t || p.kernel == 1) && (p.weight_t == 1 || p.weight_c == 1),
                  "weight: expected its taps or its channels to lie side by side in memory");
  check_shape(map, "map", {p.batch, p.outputs, map.size(2), map.size(3)});
  check_like(map, "map", regions, "regions");
  check_layout(map, "map");
  p.map = map_of(map);
  check_beside(rows, "rows", regions, "regions", {p.map.height, p.taps});
  check_beside(columns, "columns", regions, "regions", {p.map.width, p.taps});
  p.of_rows = rows.data_ptr();
  STD_TORCH_CHECK(map.numel() > 0 && regions.numel() > 0, "map, regions: expected at least one number");

  int64_t columns_padded = 0, sides_padded = 0;
  for (int64_t s : scales) columns_padded += padded(p.batch * s * s), sides_padded += padded(s * p.kernel);
  void* transposed = nullptr;
  work.take_memory({{&p.by_column, backward ? 0 : columns_padded * p.channels},
                    {&p.by_channel, of_weight ? p.batch * p.rows * padded(p.channels) : 0},
                    {&transposed, p.taps * padded(p.map.width)},
                    {&p.column_panels, backward ? p.map.width * sides_padded : 0},
                    {&p.products, backward ? p.outputs * p.kernel * p.kernel * p.batch * p.rows : 0}});
  p.of_columns = transposed;
  if (p.scalar == Scalar::float64)
    lay_out_columns(p, static_cast<const double*>(columns.data_ptr()), static_cast<double*>(transposed),
                    static_cast<double*>(p.column_panels));
  else
    lay_out_columns(p, static_cast<const float*>(columns.data_ptr()), static_cast<float*>(transposed),
                    static_cast<float*>(p.column_panels));
  if (p.by_column != nullptr || p.by_channel != nullptr)
    run(pyramid_conv_pack, p, p.num_scales * channel_blocks(p), grain_of(REGION_PANEL * p.batch * p.rows));
  return work;
}

int64_t units(const PyramidConv& p) { return (p.outputs + outputs_at_once(p) - 1) / outputs_at_once(p); }

int64_t grain(const PyramidConv& p) {
  return grain_of(outputs_at_once(p) * (p.kernel * p.kernel * p.channels * p.num_scales + p.map.height * p.map.width));
}

void pyramid_conv(const Tensor& regions, const Tensor& weight, const Scales& scales, const Tensor& rows,
                  const Tensor& columns, const Tensor& map) {
  const Work work = described(regions, weight, scales, rows, columns, map, false, false);
  request_huge_pages(map);
  run(::pyramid_conv, work.p, units(work.p), grain(work.p));
}

void pyramid_conv_backward(const Tensor& grad, const Tensor& regions, const Tensor& weight, const Scales& scales,
                           const Tensor& rows, const Tensor& columns, const MaybeTensor& grad_regions,
                           const MaybeTensor& grad_weight) {
  Work work = described(regions, weight, scales, rows, columns, grad, true, grad_weight.has_value());
  PyramidConv& p = work.p;
  if (grad_weight) {
    check_shape(*grad_weight, "grad_weight", {p.outputs, p.num_scales * p.channels, p.kernel, p.kernel});
    check_like(*grad_weight, "grad_weight", regions, "regions");
    const int64_t taps = p.kernel * p.kernel;
    STD_TORCH_CHECK(grad_weight->stride(1) == taps && grad_weight->stride(2) == p.kernel && grad_weight->stride(3) == 1,
                    "grad_weight: expected the weights of an output channel to lie side by side in memory");
    p.grad_weight = grad_weight->data_ptr(), p.grad_weight_o = grad_weight->stride(0);
  }
  run(pyramid_conv_weight_gradients, p, units(p), grain(p));
  if (grad_regions) {
    check_beside(*grad_regions, "grad_regions", regions, "regions", {p.batch, p.channels, p.rows});
    p.grad_regions = grad_regions->data_ptr();
    run(pyramid_conv_region_gradients, p, p.num_scales * channel_blocks(p),
        grain_of(REGION_PANEL * p.kernel * p.kernel * p.outputs));
  }
}

constexpr Operator OPERATORS[] = {
    {"pyramid_conv(Tensor regions, Tensor weight, int[] scales, Tensor rows, Tensor columns, Tensor(a!) map) -> ()",
     TORCH_BOX(&pyramid_conv)},
    {"pyramid_conv_backward(Tensor grad, Tensor regions, Tensor weight, int[] scales, Tensor rows, Tensor columns, "
     "Tensor(a!)? grad_regions, Tensor(b!)? grad_weight) -> ()",
     TORCH_BOX(&pyramid_conv_backward)},
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, OPERATORS)
