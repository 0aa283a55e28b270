// conv3x3's operators, as the CPU library registers them.
#pragma once

#include "../common/tensor.h"

// Each writes into the tensor it is given last. tiles: (16, C, rows * ceil(w / 2)), for as many rows of tiles from
// first_row on, counted through all images.
void conv3x3_tiles(const Tensor& map, int64_t first_row, bool of_result, const Tensor& tiles);
void conv3x3(const Tensor& tiles, int64_t first_row, const Tensor& map);
void conv3x3_weight(const Tensor& weight, bool reversed, const Tensor& transformed);
