// conv3x3's operators on the CPU: check, describe the work, share it out among torch's threads.
#include "conv3x3.h"

#include "../common/pages.h"
#include "../common/scalar_of.h"
#include "operators.h"

namespace {

Scalar checked_scalar(const Tensor& tensor, const char* name) {
  const Scalar scalar = scalar_of(tensor, name);
  STD_TORCH_CHECK(scalar == Scalar::float32 || scalar == Scalar::float64, name, ": expected float32 or float64");
  return scalar;
}

Conv3x3 described(const Tensor& map, const Tensor& tiles, int64_t first_row) {
  isa();  // a wrong APC_KERNELS_ISA is reported from here, not from inside a thread
  STD_TORCH_CHECK(map.dim() == 4, "map: expected 4 dimensions, got ", map.dim());
  STD_TORCH_CHECK(map.size(2) > 0 && map.size(3) > 0, "map: expected a height and width of 1 or more");
  STD_TORCH_CHECK(map.stride(3) == 1 || map.size(3) == 1, "map: expected columns to lie side by side in memory");
  Conv3x3 p{};
  p.scalar = checked_scalar(map, "map");
  p.channels = map.size(1), p.height = map.size(2), p.width = map.size(3);
  p.stride_b = map.stride(0), p.stride_c = map.stride(1), p.stride_y = map.stride(2);
  STD_TORCH_CHECK(tiles.dim() == 3, "tiles: expected 3 dimensions, got ", tiles.dim());
  p.image_rows = (p.height + 1) / 2, p.columns = (p.width + 1) / 2;
  p.first_row = first_row, p.rows = tiles.size(2) / p.columns;
  STD_TORCH_CHECK(first_row >= 0 && first_row + p.rows <= map.size(0) * p.image_rows, "first_row: expected rows of ",
                  map.size(0) * p.image_rows, ", got ", p.rows, " from ", first_row, " on");
  check_shape(tiles, "tiles", {PLANES, p.channels, p.rows * p.columns});
  check_like(tiles, "tiles", map, "map");
  STD_TORCH_CHECK(tiles.is_contiguous(), "tiles: expected a contiguous tensor");
  p.map = map.data_ptr(), p.tiles = tiles.data_ptr();
  return p;
}

// Enough elements of a map for a thread to be worth waking.
constexpr int64_t GRAIN = 32768;
int64_t grain(int64_t elements) { return elements >= GRAIN ? 1 : GRAIN / (elements < 1 ? 1 : elements); }

}  // namespace

void conv3x3_tiles(const Tensor& map, int64_t first_row, bool of_result, const Tensor& tiles) {
  const Conv3x3 p = described(map, tiles, first_row);
  request_huge_pages(p.tiles, tiles.numel() * tiles.element_size());
  torch::stable::parallel_for(0, p.channels, grain(4 * p.rows * p.columns), [&](int64_t begin, int64_t end) {
    if (of_result) return APC_DISPATCH_ISA(tiles_of_result, p, begin, end);
    APC_DISPATCH_ISA(tiles_of_map, p, begin, end);
  });
}

void conv3x3(const Tensor& tiles, int64_t first_row, const Tensor& map) {
  const Conv3x3 p = described(map, tiles, first_row);
  torch::stable::parallel_for(0, p.channels, grain(4 * p.rows * p.columns),
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(map_of_tiles, p, begin, end); });
}

void conv3x3_weight(const Tensor& weight, bool reversed, const Tensor& transformed) {
  isa();
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected (outputs, inputs, 3, 3)");
  STD_TORCH_CHECK((weight.stride(1) == 9 || weight.size(1) == 1) && weight.stride(2) == 3 && weight.stride(3) == 1,
                  "weight: expected inputs and the 3x3 of each to lie side by side in memory");
  check_shape(transformed, "transformed", {PLANES, weight.size(0), weight.size(1)});
  check_like(transformed, "transformed", weight, "weight");
  STD_TORCH_CHECK(transformed.is_contiguous(), "transformed: expected a contiguous tensor");
  Conv3x3Weight p{};
  p.scalar = checked_scalar(weight, "weight");
  p.outputs = weight.size(0), p.inputs = weight.size(1), p.stride_o = weight.stride(0);
  p.reversed = reversed, p.weight = weight.data_ptr(), p.transformed = transformed.data_ptr();
  torch::stable::parallel_for(0, p.outputs, grain(9 * p.inputs),
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(transform_weight, p, begin, end); });
}
