// conv3x3's CPU kernels: between maps and the tiles that Winograd's F(m×m, 3×3) multiplies, m = 2 or 4.
//
// A map of h×w, padded by one, is cut into tiles of (m + 2)×(m + 2), m apart, one for each m×m of the result. The
// transform of a tile has as many numbers; each lies in a plane of its own, (tiles, channels), so that the convolution
// becomes (m + 2)² matrix products. With a dilation d the map is d×d interleaved maps, each with tiles of its own: tile
// j of a row of tiles belongs to every d-th column from column j / image_columns on, and the same holds for rows.
#pragma once

#include "../common/isa.h"

constexpr int64_t STEP = 32;  // channels in memory are padded to a multiple of it

struct Conv3x3 {
  Scalar scalar;                    // float32 or float64
  int64_t side, dilation;           // m, d
  int64_t channels;                 // of the map, a part of the tiles' channels
  int64_t tile_rows, tile_columns;  // of one of the d×d maps of an image
  int64_t first_row, rows;          // of tiles, counted through all images: dilation * tile_rows for each
  Map map;                          // columns or channels side by side
  void* tiles;                      // (planes, rows * columns, channels)
  int64_t plane, row;               // strides of tiles; channels lie side by side
  bool of_result;                   // tiles_of_map: transform a result's gradient, the adjoint of map_of_tiles
  const void* bias;                 // map_of_tiles: (channels,), or null
  Map other;                        // map_of_tiles: added to the result, if it has data; channels side by side
  bool relu;                        // map_of_tiles
  int64_t columns() const { return dilation * tile_columns; }
  int64_t planes() const { return (side + 2) * (side + 2); }
};

struct Conv3x3Weight {
  Scalar scalar;
  int64_t side;
  int64_t outputs, inputs, stride_o, stride_i, stride_y, stride_x;
  bool backwards;     // for the gradient of the map: outputs and inputs exchanged, the 3×3 read backwards
  void* weight;       // written by weight_of_planes, else read
  void* transformed;  // transform_weight: (planes, columns / 32, depth, 32); weight_of_planes: (planes, outputs, row)
  int64_t plane, panel, row;
};

// Units are rows of tiles in groups of channels; of a weight, panels of columns; of a weight's gradient, outputs.
APC_DECLARE_KERNEL(tiles_of_map, Conv3x3)
APC_DECLARE_KERNEL(map_of_tiles, Conv3x3)
APC_DECLARE_KERNEL(transform_weight, Conv3x3Weight)
APC_DECLARE_KERNEL(weight_of_planes, Conv3x3Weight)

constexpr int64_t GROUP = 128;  // channels of a unit

inline int64_t tile_units(const Conv3x3& p) { return p.rows * ((p.channels + GROUP - 1) / GROUP); }
