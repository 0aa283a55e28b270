// The product of matrices, compiled once for each instruction set. Bytes: a unit reads its rows of left once, its
// columns of right once, and out as often as the depth has chunks.
#include "../common/panels_cpu.h"
#include "product.h"

namespace {

constexpr int64_t CHUNK = 256;  // of depth: with longer sums in one piece rounding errors would grow

inline int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }
// The smallest size by which `count` is cut into the same number of parts.
inline int64_t balanced(int64_t count, int64_t most) {
  const int64_t parts = parts_of(count, most);
  return (count + parts - 1) / parts;
}

// Rows of left at a chunk of the depth: row m, number k is data[m * stride + k], or data[k * stride + m].
template <typename T>
struct Rows {
  const T* data;
  int64_t row, stride;
};

template <typename T>
Rows<T> copied(Rows<T> rows, int64_t count, int64_t depth, T* to) {
  constexpr int64_t APART = CHUNK + 16;
  for (int64_t m = 0; m < count; ++m) std::memcpy(to + m * APART, rows.data + m * rows.row, depth * sizeof(T));
  return {to, APART, APART};
}

template <typename T, bool ROWS_ADJACENT>
void unit(const Product& p, int64_t plane, int64_t first_row, int64_t last_row, int64_t first_column,
          int64_t last_column, T* scratch) {
  constexpr int64_t N = BLOCK_VECTORS * Pack<T>::width;
  const int64_t step = balanced(last_row - first_row, BLOCK_ROWS);
  const T* const left = static_cast<const T*>(p.left) + plane * p.left_plane + first_row * p.left_row;
  const T* const right = static_cast<const T*>(p.right) + plane * p.right_plane;
  T* const out = static_cast<T*>(p.out) + plane * p.out_plane;
  const T* const other = p.other == nullptr ? nullptr : static_cast<const T*>(p.other) + plane * p.other_plane;
  const T* const bias = static_cast<const T*>(p.bias);
  for (int64_t k = 0; k < p.depth; k += CHUNK) {
    const bool is_last = k + CHUNK >= p.depth;
    const int64_t depth = is_last ? p.depth - k : CHUNK;
    Rows<T> rows{left + k * p.left_step, p.left_row, ROWS_ADJACENT ? p.left_step : p.left_row};
    if (scratch != nullptr) rows = copied<T>(rows, last_row - first_row, depth, scratch);
    for (int64_t n = first_column; n < last_column; n += N) {
      const T* const panel = right + n / PANEL * p.right_panel + k * p.right_step + n % PANEL;
      for (int64_t m = first_row; m < last_row; m += step) {
        const int64_t count = last_row - m < step ? last_row - m : step;
        const T* const from = rows.data + (m - first_row) * rows.row;
        T* const to = out + m * p.out_row + n;
        const Epilogue<T> e{p.add || k > 0, is_last && bias != nullptr ? bias + n : nullptr,
                            is_last && other != nullptr ? other + m * p.other_row + n : nullptr, p.other_row,
                            is_last && p.relu};
        if (last_column - n >= N)
          block_of<T, ROWS_ADJACENT>(count, from, rows.stride, panel, p.right_step, depth, to, p.out_row, e);
        else
          narrow_block<T, ROWS_ADJACENT>(count, last_column - n, from, rows.stride, panel, p.right_step, depth, to,
                                         p.out_row, e);
      }
    }
  }
}

template <typename T>
void product_as(const Product& p, int64_t begin, int64_t end) {
  const int64_t row_blocks = parts_of(p.rows, UNIT_ROWS), column_blocks = parts_of(p.columns, UNIT_COLUMNS);
  const int64_t rows = balanced(p.rows, UNIT_ROWS);
  const bool adjacent = p.left_row == 1 && p.left_step != 1;
  const bool copies = !adjacent && p.left_row * sizeof(T) % 1024 == 0;
  Scratch<T> scratch(copies ? rows * (CHUNK + 16) : 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t plane = i / (row_blocks * column_blocks), row = i / column_blocks % row_blocks * rows;
    const int64_t column = i % column_blocks * UNIT_COLUMNS;
    const int64_t last_row = row + rows < p.rows ? row + rows : p.rows;
    const int64_t last_column = column + UNIT_COLUMNS < p.columns ? column + UNIT_COLUMNS : p.columns;
    if (adjacent)
      unit<T, true>(p, plane, row, last_row, column, last_column, nullptr);
    else
      unit<T, false>(p, plane, row, last_row, column, last_column, copies ? scratch.data : nullptr);
  }
}

template <typename T>
void pack_panels_as(const Panels& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * PANEL, count = p.columns - first < PANEL ? p.columns - first : PANEL;
    T* const to = static_cast<T*>(p.panels) + panel * p.depth * PANEL;
    transpose<T>(static_cast<const T*>(p.matrix) + first * p.row, p.row, count, p.depth, to, PANEL);
    for (int64_t k = 0; k < p.depth; ++k)
      for (int64_t n = count; n < PANEL; ++n) to[k * PANEL + n] = 0;
  }
}

}  // namespace

APC_DEFINE_WIDE_KERNEL(product, Product)
APC_DEFINE_WIDE_KERNEL(pack_panels, Panels)
