// pyramid_conv on the CPU: what the operators (pyramid_conv.cpp) hand to the kernels (pyramid_conv_cpu.cpp).
//
// The products of regions and taps, P (k², columns) for each output channel and scale, stay in a thread's cache. They
// become the rows of a plane, (Σ s·k, w), by the columns' matrix, and the plane by the rows' matrix. Backward goes the
// same way in reverse, and keeps the gradients of all P for the gradient of the regions.
#pragma once

#include "../common/isa.h"
#include "../common/pyramid.h"

struct PyramidConv : Pyramid {
  int64_t outputs, kernel, taps;  // taps: Σ s·k
  const void* weight;             // (O, S*C, k, k): its taps or its channels lie side by side
  int64_t weight_o, weight_c, weight_t;
  const void* of_rows;     // (h, taps)
  const void* of_columns;  // (taps, padded w)
  void* column_panels;     // for each scale panels of its s·k columns, (padded s·k / 32, w, 32)
  Map map;                 // the result, or its gradient, (B, O, h, w)
  void* products;          // gradients of P: for each scale (O * k², columns)
  void* grad_weight;       // (O, S*C, k, k), or null: each output channel contiguous
  int64_t grad_weight_o;   // the step between them
  void* grad_regions;      // (B, C, J), or null
};

// Output channels that a unit takes: several, if they lie side by side in memory.
static inline int64_t outputs_at_once(const PyramidConv& p) { return p.map.stride_c == 1 && p.outputs > 1 ? 16 : 1; }

// Scales * blocks of channels:
APC_DECLARE_KERNEL(pyramid_conv_pack, PyramidConv)
APC_DECLARE_KERNEL(pyramid_conv_region_gradients, PyramidConv)
// Blocks of output channels:
APC_DECLARE_KERNEL(pyramid_conv, PyramidConv)
APC_DECLARE_KERNEL(pyramid_conv_weight_gradients, PyramidConv)
