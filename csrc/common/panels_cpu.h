// Products of matrices on the CPU whose right side lies in panels of 32 columns: out (rows x columns) = or += left
// (rows x depth) * right, with what follows a convolution in the same pass: + bias, + another matrix, ReLU.
//
// A block of out stays in registers while the depth goes by: as many rows as there are registers for, two vectors wide.
// A number of `left` is broadcast, a row of a panel is read in whole vectors. Written with the compiler's vector
// extension, this reaches the rate of the processor's multipliers. Sums have an order that depends on the shape alone.
#pragma once

#include "vectors_cpu.h"

constexpr int64_t PANEL = 32;  // columns

namespace {

#if defined(__AVX512F__)
constexpr int BLOCK_ROWS = 14;
#elif defined(__aarch64__)
constexpr int BLOCK_ROWS = 12;
#else
constexpr int BLOCK_ROWS = 6;
#endif
constexpr int BLOCK_VECTORS = 2;

// What is added to the products, each null if there is none. Columns are counted from the block's first.
template <typename T>
struct Epilogue {
  bool add;  // to what out holds
  const T* bias;
  const T* other;
  int64_t other_row;
  bool relu;
};

template <typename T, typename V>
inline V finished(V sum, const T* out, const T* bias, const T* other, bool relu) {
  if (out != nullptr) sum += *reinterpret_cast<const V*>(out);
  if (bias != nullptr) sum += *reinterpret_cast<const V*>(bias);
  if (other != nullptr) sum += *reinterpret_cast<const V*>(other);
  return relu ? (sum < V{} ? V{} : sum) : sum;  // NaN stays
}

// left(m, k) = left[m * row + k * step]; one of them is 1.
template <typename T, int M, bool ROWS_ADJACENT>
inline void block(const T* left, int64_t stride, const T* right, int64_t right_step, int64_t depth, T* out,
                  int64_t out_row, const Epilogue<T>& e) {
  using Vec = typename Pack<T>::type;
  constexpr int V = BLOCK_VECTORS, W = Pack<T>::width;
  // What is needed at the end is asked for at the start.
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(out + m * out_row + v * W, 1);
      if (e.other != nullptr) __builtin_prefetch(e.other + m * e.other_row + v * W);
    }
  Vec sum[M][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = *reinterpret_cast<const Vec*>(right + k * right_step + v * W);
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      const T a = ROWS_ADJACENT ? left[k * stride + m] : left[m * stride + k];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] += a * b[v];
    }
  }
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      T* const to = out + m * out_row + v * W;
      *reinterpret_cast<Vec*>(to) =
          finished<T, Vec>(sum[m][v], e.add ? to : nullptr, e.bias == nullptr ? nullptr : e.bias + v * W,
                           e.other == nullptr ? nullptr : e.other + m * e.other_row + v * W, e.relu);
    }
}

// The same for as many rows as are given, up to M.
template <typename T, bool ROWS_ADJACENT, int M = BLOCK_ROWS>
inline void block_of(int64_t rows, const T* left, int64_t stride, const T* right, int64_t right_step, int64_t depth,
                     T* out, int64_t out_row, const Epilogue<T>& e) {
  if constexpr (M > 1)
    if (rows < M)
      return block_of<T, ROWS_ADJACENT, M - 1>(rows, left, stride, right, right_step, depth, out, out_row, e);
  block<T, M, ROWS_ADJACENT>(left, stride, right, right_step, depth, out, out_row, e);
}

// A block of fewer columns than its vectors hold: computed beside out, and finished number by number.
template <typename T, bool ROWS_ADJACENT>
void narrow_block(int64_t rows, int64_t columns, const T* left, int64_t stride, const T* right, int64_t right_step,
                  int64_t depth, T* out, int64_t out_row, const Epilogue<T>& e) {
  constexpr int64_t N = BLOCK_VECTORS * Pack<T>::width;
  T sums[BLOCK_ROWS * N];
  block_of<T, ROWS_ADJACENT>(rows, left, stride, right, right_step, depth, sums, N,
                             {false, nullptr, nullptr, 0, false});
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < columns; ++n) {
      T value = sums[m * N + n];
      if (e.add) value += out[m * out_row + n];
      if (e.bias != nullptr) value += e.bias[n];
      if (e.other != nullptr) value += e.other[m * e.other_row + n];
      out[m * out_row + n] = e.relu && value < T(0) ? T(0) : value;
    }
}

// out (rows x columns) = or += left (rows x depth) * right in panels, `panel` apart, whose rows are `step` apart. Row
// m, number k of left is left[m * stride + k], or left[k * stride + m]. Long sums are taken in pieces, and each by
// itself before it is added: rounding errors grow with the number of additions one after the other.
template <typename T, bool ROWS_ADJACENT, int64_t PIECE = 64>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* left, int64_t stride, const T* right,
              int64_t panel, int64_t step, T* out, int64_t out_row, bool add = false) {
  constexpr int64_t N = BLOCK_VECTORS * Pack<T>::width;
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

}  // namespace
