// conv3x3's operators on the CPU: check, describe the work, share it out among torch's threads. Each writes into the
// tensor it is given last. tiles: (16, C, rows * ceil(w / 2)), for as many rows of tiles from first_row on, counted
// through all images.
#include "conv3x3.h"

#include "../common/run.h"

namespace {

Scalar checked_scalar(const Tensor& tensor, const char* name) {
  const Scalar scalar = scalar_of(tensor, name);
  STD_TORCH_CHECK(scalar == Scalar::float32 || scalar == Scalar::float64, name, ": expected float32 or float64");
  return scalar;
}

Conv3x3 described(const Tensor& map, const Tensor& tiles, int64_t first_row) {
  check_dimensions(map, "map", 4);
  STD_TORCH_CHECK(map.size(2) > 0 && map.size(3) > 0, "map: expected a height and width of 1 or more");
  STD_TORCH_CHECK(map.stride(3) == 1 || map.size(3) == 1, "map: expected columns to lie side by side in memory");
  Conv3x3 p{};
  p.scalar = checked_scalar(map, "map");
  p.channels = map.size(1), p.map = map_of(map);
  check_dimensions(tiles, "tiles", 3);
  p.image_rows = (p.map.height + 1) / 2, p.columns = (p.map.width + 1) / 2;
  p.first_row = first_row, p.rows = tiles.size(2) / p.columns;
  STD_TORCH_CHECK(first_row >= 0 && first_row + p.rows <= map.size(0) * p.image_rows, "first_row: expected rows of ",
                  map.size(0) * p.image_rows, ", got ", p.rows, " from ", first_row, " on");
  check_beside(tiles, "tiles", map, "map", {PLANES, p.channels, p.rows * p.columns});
  p.tiles = tiles.data_ptr();
  return p;
}

void conv3x3_tiles(const Tensor& map, int64_t first_row, bool of_result, const Tensor& tiles) {
  const Conv3x3 p = described(map, tiles, first_row);
  request_huge_pages(tiles);
  run(of_result ? tiles_of_result : tiles_of_map, p, p.channels, grain_of(4 * p.rows * p.columns));
}

void conv3x3(const Tensor& tiles, int64_t first_row, const Tensor& map) {
  const Conv3x3 p = described(map, tiles, first_row);
  run(map_of_tiles, p, p.channels, grain_of(4 * p.rows * p.columns));
}

void conv3x3_weight(const Tensor& weight, bool reversed, const Tensor& transformed) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected (outputs, inputs, 3, 3)");
  STD_TORCH_CHECK((weight.stride(1) == 9 || weight.size(1) == 1) && weight.stride(2) == 3 && weight.stride(3) == 1,
                  "weight: expected inputs and the 3x3 of each to lie side by side in memory");
  check_beside(transformed, "transformed", weight, "weight", {PLANES, weight.size(0), weight.size(1)});
  Conv3x3Weight p{};
  p.scalar = checked_scalar(weight, "weight");
  p.outputs = weight.size(0), p.inputs = weight.size(1), p.stride_o = weight.stride(0);
  p.reversed = reversed, p.weight = weight.data_ptr(), p.transformed = transformed.data_ptr();
  run(transform_weight, p, p.outputs, grain_of(9 * p.inputs));
}

constexpr Operator OPERATORS[] = {
    {"conv3x3_tiles(Tensor map, int first_row, bool of_result, Tensor(a!) tiles) -> ()", TORCH_BOX(&conv3x3_tiles)},
    {"conv3x3(Tensor tiles, int first_row, Tensor(a!) map) -> ()", TORCH_BOX(&conv3x3)},
    {"conv3x3_weight(Tensor weight, bool reversed, Tensor(a!) transformed) -> ()", TORCH_BOX(&conv3x3_weight)},
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, OPERATORS)
