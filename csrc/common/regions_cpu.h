// Products with the region vectors of a pyramid, which pyramid_conv and pyramid_reduce share. The regions of a scale,
// of all images, are the columns of a matrix (channels x columns), in panels of 32 (panels_cpu.h).
#pragma once

#include "panels_cpu.h"
#include "pyramid.h"

namespace {

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
