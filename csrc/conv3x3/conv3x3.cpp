// conv3x3's operators on the CPU: check, describe the work, share it out among torch's threads. Each writes into the
// tensor it is given last. tiles: (planes, rows * columns, channels), for as many rows of tiles from first_row on,
// counted through all images.
#include "conv3x3.h"

#include "../common/run.h"
#include "product.h"

namespace {

Scalar checked_scalar(const Tensor& tensor, const char* name) {
  const Scalar scalar = scalar_of(tensor, name);
  STD_TORCH_CHECK(scalar == Scalar::float32 || scalar == Scalar::float64, name, ": expected float32 or float64");
  return scalar;
}

void check_last_adjacent(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1, name,
                  ": expected the numbers of a row to lie side by side in memory");
}

const void* checked_bias(const MaybeTensor& bias, const Tensor& beside, const char* name, int64_t columns) {
  if (!bias) return nullptr;
  check_beside(*bias, "bias", beside, name, {columns});
  return bias->data_ptr();
}

Conv3x3 described(const Tensor& map, const Tensor& tiles, int64_t side, int64_t dilation, int64_t first_row) {
  check_dimensions(map, "map", 4);
  STD_TORCH_CHECK(map.size(2) > 0 && map.size(3) > 0, "map: expected a height and width of 1 or more");
  STD_TORCH_CHECK(side == 2 || side == 4, "side: expected 2 or 4, got ", side);
  STD_TORCH_CHECK(dilation > 0, "dilation: expected 1 or more, got ", dilation);
  Conv3x3 p{};
  p.scalar = checked_scalar(map, "map");
  p.side = side, p.dilation = dilation, p.channels = map.size(1), p.map = map_of(map);
  const int64_t apart = side * dilation;
  p.tile_rows = (p.map.height + apart - 1) / apart, p.tile_columns = (p.map.width + apart - 1) / apart;
  check_dimensions(tiles, "tiles", 3);
  check_like(tiles, "tiles", map, "map");
  check_last_adjacent(tiles, "tiles");
  const int64_t all = map.size(0) * dilation * p.tile_rows;
  p.first_row = first_row, p.rows = tiles.size(1) / p.columns();
  STD_TORCH_CHECK(first_row >= 0 && first_row + p.rows <= all, "first_row: expected rows of ", all, ", got ", p.rows,
                  " from ", first_row, " on");
  check_shape(tiles, "tiles", {p.planes(), p.rows * p.columns(), p.channels});
  p.tiles = tiles.data_ptr(), p.plane = tiles.stride(0), p.row = tiles.stride(1);
  return p;
}

void conv3x3_tiles(const Tensor& map, int64_t side, int64_t dilation, int64_t first_row, bool of_result,
                   const Tensor& tiles) {
  Conv3x3 p = described(map, tiles, side, dilation, first_row);
  p.of_result = of_result;
  run(tiles_of_map, p, tile_units(p), grain_of(4 * p.columns() * p.channels));
}

void conv3x3(const Tensor& tiles, int64_t side, int64_t dilation, int64_t first_row, const MaybeTensor& bias,
             const MaybeTensor& other, bool relu, const Tensor& map) {
  Conv3x3 p = described(map, tiles, side, dilation, first_row);
  p.bias = checked_bias(bias, map, "map", p.channels), p.relu = relu;
  if (other) {
    check_map_like(*other, "other", map, "map");
    for (const Tensor& each : {*other, map})
      STD_TORCH_CHECK(each.stride(1) == 1 || p.channels == 1, "other and map: expected channels to lie side by side");
    p.other = map_of(*other);
  }
  if (p.first_row == 0) request_huge_pages(map);
  run(map_of_tiles, p, tile_units(p), grain_of(4 * p.columns() * p.channels));
}

Conv3x3Weight described_weight(const Tensor& weight, const Tensor& transformed, int64_t side) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected (outputs, inputs, 3, 3)");
  STD_TORCH_CHECK(side == 2 || side == 4, "side: expected 2 or 4, got ", side);
  check_like(transformed, "transformed", weight, "weight");
  Conv3x3Weight p{};
  p.scalar = checked_scalar(weight, "weight"), p.side = side;
  p.outputs = weight.size(0), p.inputs = weight.size(1);
  p.stride_o = weight.stride(0), p.stride_i = weight.stride(1), p.stride_y = weight.stride(2);
  p.stride_x = weight.stride(3), p.weight = weight.data_ptr(), p.transformed = transformed.data_ptr();
  return p;
}

void conv3x3_weight(const Tensor& weight, int64_t side, bool backwards, const Tensor& transformed) {
  Conv3x3Weight p = described_weight(weight, transformed, side);
  const int64_t depth = backwards ? p.outputs : p.inputs, columns = backwards ? p.inputs : p.outputs;
  const int64_t panels = (columns + STEP - 1) / STEP;
  check_beside(transformed, "transformed", weight, "weight", {(side + 2) * (side + 2), panels, depth, STEP});
  p.backwards = backwards, p.plane = transformed.stride(0), p.panel = transformed.stride(1);
  run(transform_weight, p, panels, grain_of(9 * depth * STEP));
}

void conv3x3_weight_gradient(const Tensor& planes, const Tensor& weight) {
  Conv3x3Weight p = described_weight(weight, planes, 2);
  check_shape(planes, "planes", {16, p.outputs, p.inputs});
  check_last_adjacent(planes, "planes");
  p.plane = planes.stride(0), p.row = planes.stride(1);
  run(weight_of_planes, p, p.outputs, grain_of(16 * p.inputs));
}

// left (planes, rows, depth), right (planes, panels, depth, 32), bias (columns,), other and out (planes, rows,
// columns).
void products(const Tensor& left, const Tensor& right, const MaybeTensor& bias, const MaybeTensor& other, bool relu,
              bool add, const Tensor& out) {
  check_dimensions(left, "left", 3);
  check_dimensions(out, "out", 3);
  Product p{};
  p.scalar = checked_scalar(left, "left");
  p.planes = left.size(0), p.rows = left.size(1), p.depth = left.size(2), p.columns = out.size(2);
  STD_TORCH_CHECK(p.depth > 0, "left: expected a depth of 1 or more");
  STD_TORCH_CHECK(left.stride(2) == 1 || left.stride(1) == 1, "left: expected rows or columns to lie side by side");
  check_shape(right, "right", {p.planes, (p.columns + STEP - 1) / STEP, p.depth, STEP});
  check_shape(out, "out", {p.planes, p.rows, p.columns});
  check_like(right, "right", left, "left");
  check_like(out, "out", left, "left");
  check_last_adjacent(right, "right");
  check_last_adjacent(out, "out");
  p.left = left.data_ptr(), p.left_plane = left.stride(0), p.left_row = left.stride(1), p.left_step = left.stride(2);
  p.right = right.data_ptr(), p.right_plane = right.stride(0), p.right_panel = right.stride(1);
  p.right_step = right.stride(2);
  p.out = out.data_ptr(), p.out_plane = out.stride(0), p.out_row = out.stride(1);
  p.bias = checked_bias(bias, left, "left", p.columns), p.add = add, p.relu = relu;
  if (other) {
    check_shape(*other, "other", {p.planes, p.rows, p.columns});
    check_like(*other, "other", left, "left");
    check_last_adjacent(*other, "other");
    p.other = other->data_ptr(), p.other_plane = other->stride(0), p.other_row = other->stride(1);
  }
  if (!add) request_huge_pages(out);
  if (p.planes > 0 && p.rows > 0 && p.columns > 0) run(product, p, product_units(p));
}

void product_panels(const Tensor& matrix, const Tensor& panels) {
  check_dimensions(matrix, "matrix", 2);
  Panels p{};
  p.scalar = checked_scalar(matrix, "matrix");
  p.columns = matrix.size(0), p.depth = matrix.size(1), p.matrix = matrix.data_ptr(), p.row = matrix.stride(0);
  check_last_adjacent(matrix, "matrix");
  const int64_t count = (p.columns + STEP - 1) / STEP;
  check_beside(panels, "panels", matrix, "matrix", {count, p.depth, STEP});
  p.panels = panels.data_ptr();
  run(pack_panels, p, count, grain_of(p.depth * STEP));
}

constexpr Operator OPERATORS[] = {
    {"conv3x3_tiles(Tensor map, int side, int dilation, int first_row, bool of_result, Tensor(a!) tiles) -> ()",
     TORCH_BOX(&conv3x3_tiles)},
    {"conv3x3(Tensor tiles, int side, int dilation, int first_row, Tensor? bias, Tensor? other, bool relu, "
     "Tensor(a!) map) -> ()",
     TORCH_BOX(&conv3x3)},
    {"conv3x3_weight(Tensor weight, int side, bool backwards, Tensor(a!) transformed) -> ()",
     TORCH_BOX(&conv3x3_weight)},
    {"conv3x3_weight_gradient(Tensor planes, Tensor(a!) weight) -> ()", TORCH_BOX(&conv3x3_weight_gradient)},
    {"products(Tensor left, Tensor right, Tensor? bias, Tensor? other, bool relu, bool add, Tensor(a!) out) -> ()",
     TORCH_BOX(&products)},
    {"product_panels(Tensor matrix, Tensor(a!) panels) -> ()", TORCH_BOX(&product_panels)},
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, OPERATORS)
