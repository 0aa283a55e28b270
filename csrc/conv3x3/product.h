// The product of matrices that convolutions are computed by (../common/panels_cpu.h): its parameters.
#pragma once

#include "../common/isa.h"

// For every plane: out (rows, columns) = or += left (rows, depth) * right (depth, columns) + bias + other, then ReLU.
struct Product {
  Scalar scalar;  // float32 or float64
  int64_t planes, rows, depth, columns;
  const void* left;  // rows or depth side by side
  int64_t left_plane, left_row, left_step;
  const void* right;  // panels of 32 columns
  int64_t right_plane, right_panel, right_step;
  void* out;
  int64_t out_plane, out_row;
  const void* bias;   // (columns,), or null
  const void* other;  // as out, or null
  int64_t other_plane, other_row;
  bool add, relu;
};

// Units are blocks of rows and columns of a plane, as many as product_units counts.
APC_DECLARE_KERNEL(product, Product)

// The right side of a product from its transpose: panels (columns / 32, depth, 32) from a matrix (columns, depth). What
// is beyond the columns becomes 0.
struct Panels {
  Scalar scalar;
  int64_t columns, depth;
  const void* matrix;
  int64_t row;  // depth side by side
  void* panels;
};

// Units are panels.
APC_DECLARE_KERNEL(pack_panels, Panels)

constexpr int64_t UNIT_ROWS = 140,
                  UNIT_COLUMNS = 256;  // a left and a right side of which stay in the second-level cache

inline int64_t product_units(const Product& p) {
  return p.planes * ((p.rows + UNIT_ROWS - 1) / UNIT_ROWS) * ((p.columns + UNIT_COLUMNS - 1) / UNIT_COLUMNS);
}
