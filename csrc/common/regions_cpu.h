// Products with the region vectors of a pyramid, which pyramid_conv and pyramid_reduce share. The regions of a scale,
// of all images, are the columns of a matrix (channels x columns), in panels of 32 (../conv3x3/panels_cpu.h).
#pragma once

#include "../conv3x3/panels_cpu.h"
#include "pyramid.h"

namespace {

template <typename T>
inline const T* as(const void* numbers) {
  return static_cast<const T*>(numbers);
}
template <typename T>
inline T* as(void* numbers) {
  return static_cast<T*>(numbers);
}

// out (rows x columns) = or += left (rows x depth) * right in panels, `panel` apart, whose rows are `step` apart. Row
// m, number k of left is left[m * stride + k], or left[k * stride + m]. Long sums are taken in pieces, and each by
// itself before it is added: rounding errors grow with the number of additions one after the other.
template <typename T, bool ROWS_ADJACENT>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* left, int64_t stride, const T* right,
              int64_t panel, int64_t step, T* out, int64_t out_row, bool add = false) {
  constexpr int64_t N = BLOCK_VECTORS * Pack<T>::width, PIECE = 64;
  for (int64_t k = 0; k < depth; k += PIECE) {
    const int64_t piece = depth - k < PIECE ? depth - k : PIECE;
    const Epilogue<T> e{add || k > 0, nullptr, nullptr, 0, false};
    for (int64_t n = 0; n < columns; n += N) {
      const T* const from = right + n / PANEL * panel + k * step + n % PANEL;
      for (int64_t m = 0; m < rows; m += BLOCK_ROWS) {
        const int64_t count = rows - m < BLOCK_ROWS ? rows - m : BLOCK_ROWS;
        const T* const numbers = left + (ROWS_ADJACENT ? k * stride + m : m * stride + k);
        if (columns - n >= N)
          block_of<T, ROWS_ADJACENT>(count, numbers, stride, from, step, piece, out + m * out_row + n, out_row, e);
        else
          narrow_block<T, ROWS_ADJACENT>(count, columns - n, numbers, stride, from, step, piece, out + m * out_row + n,
                                         out_row, e);
      }
    }
  }
}

// Lays out the regions of a unit, 32 channels of a scale, in panels of columns and in panels of channels; zeros follow
// the last ones. Either may be null.
template <typename T>
void pack_regions(const Pyramid& p, int64_t unit) {
  const PyramidScale scale = pyramid_scale(p, unit % p.num_scales);
  const int64_t first = unit / p.num_scales * PANEL;
  const int64_t count = p.channels - first < PANEL ? p.channels - first : PANEL;
  T* const by_column = as<T>(p.by_column) + scale.padded_before * p.channels;
  T* const by_channel = as<T>(p.by_channel) + scale.columns_before * channel_blocks(p) * PANEL + first * scale.columns;
  for (int64_t n = 0; n < scale.columns; ++n) {
    const T* const from =
        as<T>(p.regions) + (n / scale.regions * p.channels + first) * p.rows + scale.first_row + n % scale.regions;
    for (int64_t i = 0; i < PANEL; ++i) {
      const T value = i < count ? from[i * p.rows] : T(0);
      if (p.by_channel != nullptr) by_channel[n * PANEL + i] = value;
      if (p.by_column != nullptr && i < count)
        by_column[(n / PANEL * p.channels + first + i) * PANEL + n % PANEL] = value;
    }
  }
  for (int64_t n = scale.columns; n < padded(scale.columns) && p.by_column != nullptr; ++n)
    for (int64_t i = 0; i < count; ++i) by_column[(n / PANEL * p.channels + first + i) * PANEL + n % PANEL] = T(0);
}

// The gradient of a unit's regions, 32 channels of a scale: the sum over `depth` rows of `grads` (depth x columns) and
// of a weight, of which pack(first, count, to) lays out some rows as (count x 32).
template <typename T, typename Packs>
void region_gradient(const Pyramid& p, const PyramidScale& scale, int64_t first, int64_t depth, int64_t at_once,
                     const T* grads, T* grad_regions, Packs pack) {
  const int64_t count = p.channels - first < PANEL ? p.channels - first : PANEL;
  Scratch<T> weight(at_once * PANEL), sums(scale.columns * PANEL);
  for (int64_t k = 0; k < depth; k += at_once) {
    const int64_t some = depth - k < at_once ? depth - k : at_once;
    pack(k, some, weight.data);
    multiply<T, true>(scale.columns, PANEL, some, grads + k * scale.columns, scale.columns, weight.data, 0, PANEL,
                      sums.data, PANEL, k > 0);
  }
  for (int64_t n = 0; n < scale.columns; ++n)
    for (int64_t i = 0; i < count; ++i)
      grad_regions[(n / scale.regions * p.channels + first + i) * p.rows + scale.first_row + n % scale.regions] =
          sums[n * PANEL + i];
}

}  // namespace
