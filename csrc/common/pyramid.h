// The regions of a pyramid, (B, C, J) with J = Σ s² over the scales s, as operations on their vectors see them.
// Units of work take scales in turn: a scale of 6 is 36 times the work of one of 1, and threads share out ranges.
#pragma once

#include "kernel_cpu.h"

constexpr int64_t REGION_PANEL = 32, MAX_SCALES = 64, MAX_SCALE = 32768;

struct Pyramid {
  Scalar scalar;  // float32 or float64
  int64_t batch, channels, rows, num_scales;
  const int64_t* scales;
  const void* regions;  // (B, C, J)
  void* by_column;      // for each scale panels of columns (columns / 32, channels, 32), or null
  void* by_channel;     // for each scale panels of channels (channels / 32, columns, 32), or null
};

struct PyramidScale {
  int64_t side, regions, first_row;
  int64_t columns;         // regions of all images
  int64_t columns_before;  // of the scales before this one
  int64_t padded_before;   // the same, each padded to whole panels
};

static inline int64_t padded(int64_t count) { return (count + REGION_PANEL - 1) / REGION_PANEL * REGION_PANEL; }

static inline int64_t channel_blocks(const Pyramid& p) { return padded(p.channels) / REGION_PANEL; }

static inline PyramidScale pyramid_scale(const Pyramid& p, int64_t index) {
  PyramidScale scale{};
  for (int64_t i = 0; i < index; ++i) {
    const int64_t regions = p.scales[i] * p.scales[i];
    scale.first_row += regions, scale.columns_before += p.batch * regions;
    scale.padded_before += padded(p.batch * regions);
  }
  scale.side = p.scales[index], scale.regions = scale.side * scale.side, scale.columns = p.batch * scale.regions;
  return scale;
}
