// pyramid_pool on the CPU: what its operator (pyramid_pool.cpp) hands to its kernels (pyramid_pool_cpu.cpp).
//
// Forward, for an image and channel, is P_h * x * P_w^T for every scale, P_h and P_w averaging over the bins of an
// axis. Summing the rows of each row segment first (bins.h) shares the one read of x between all scales. The gradient
// is constant inside a row segment x column segment; it is worked out once for each and then copied.
#pragma once

#include "../common/isa.h"
#include "bins.h"

struct PyramidPool {
  Scalar scalar;
  int64_t batch, channels;
  int num_scales;
  const int64_t* scales;
  int columns;        // sum of s: bins of all scales along one axis
  int64_t regions;    // sum of s*s
  SegmentsView rows;  // along height
  SegmentsView cols;  // along width
  Map map;            // x, or its gradient
  void* pooled;       // (batch, channels, regions), contiguous: the result, or its gradient
  void* row_sums;     // channels_last forward only: (batch, rows.count, columns, channels) in the accumulator's type
};

// Channels_last work is done in runs of this many channels: a pixel of a 2048-channel map, so that memory is read and
// written in order, and a running sum (8 KB in float32) still stays in L1.
constexpr int64_t CHANNEL_RUN = 2048;

// Contiguous columns (NCHW); units: planes, batch * channels.
APC_DECLARE_KERNEL(pool_planes, PyramidPool)
APC_DECLARE_KERNEL(spread_planes, PyramidPool)
// Contiguous channels (NHWC); units: batch * rows.count * runs, of pool_row_bins batch * runs.
APC_DECLARE_KERNEL(pool_rows, PyramidPool)
APC_DECLARE_KERNEL(pool_row_bins, PyramidPool)
APC_DECLARE_KERNEL(spread_rows, PyramidPool)
