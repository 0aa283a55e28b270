// conv3x3's CPU kernels: between maps and the tiles that Winograd's F(2×2, 3×3) multiplies.
//
// A map of h×w, padded by one, is cut into 4×4 tiles two apart, one for each 2×2 of the result. The transform of a tile
// has 16 numbers; they lie in 16 planes (channels, tiles), so that the convolution becomes 16 matrix products.
#pragma once

#include "../common/isa.h"

constexpr int PLANES = 16;

struct Conv3x3 {
  Scalar scalar;  // float32 or float64
  int64_t channels;
  int64_t image_rows, columns;  // of tiles, in an image
  int64_t first_row, rows;      // of tiles, counted through all images
  Map map;                      // columns side by side
  void* tiles;                  // (16, channels, rows * columns)
};

struct Conv3x3Weight {
  Scalar scalar;
  int64_t outputs, inputs, stride_o;  // inputs and the 3×3 of each lie side by side
  bool reversed;                      // the 3×3 read backwards, for the gradient of the map
  const void* weight;
  void* transformed;  // (16, outputs, inputs)
};

// Units are channels, of a weight outputs.
APC_DECLARE_KERNEL(tiles_of_map, Conv3x3)
APC_DECLARE_KERNEL(tiles_of_result, Conv3x3)
APC_DECLARE_KERNEL(map_of_tiles, Conv3x3)
APC_DECLARE_KERNEL(transform_weight, Conv3x3Weight)
