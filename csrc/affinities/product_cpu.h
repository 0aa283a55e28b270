// Small matrix products on the CPU, in registers: out (rows x columns) = or += left (rows x depth) * right.
//
// A block of ROWS x 3 vectors of sums stays in registers while the depth goes by; a number of `left` is broadcast, a
// row of `right` is read in whole vectors. Written with the compiler's vector extension at the width of the instruction
// set: loops over arrays of that size are not kept in registers.
#pragma once

#include "../common/vectors_cpu.h"

namespace {

// left(i, k) = left[i * row + k * step]; the rows of right and out lie side by side in memory, `stride` apart.
template <typename A>
struct Left {
  const A* data;
  int64_t row, step;
};
template <typename A>
struct Right {
  const A* data;
  int64_t stride;
};

template <typename A, int M, int V>
inline void product_block(Left<A> left, Right<A> right, int64_t depth, A* out, int64_t out_stride, bool add) {
  using Vec = typename Pack<A>::type;
  constexpr int W = Pack<A>::width;
  Vec sum[M][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const A* from = right.data + k * right.stride;
    Vec b[V];
    for (int v = 0; v < V; ++v) b[v] = *reinterpret_cast<const Vec*>(from + v * W);
    for (int m = 0; m < M; ++m) {
      const A a = left.data[m * left.row + k * left.step];
      for (int v = 0; v < V; ++v) sum[m][v] += a * b[v];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      Vec* to = reinterpret_cast<Vec*>(out + m * out_stride + v * W);
      *to = add ? *to + sum[m][v] : sum[m][v];
    }
}

template <typename A, int M>
inline void product_rows(Left<A> left, Right<A> right, int64_t depth, int64_t columns, A* out, int64_t out_stride,
                         bool add) {
  constexpr int W = Pack<A>::width;
  int64_t n = 0;
  for (; n + 3 * W <= columns; n += 3 * W)
    product_block<A, M, 3>(left, {right.data + n, right.stride}, depth, out + n, out_stride, add);
  for (; n < columns; n += W)
    product_block<A, M, 1>(left, {right.data + n, right.stride}, depth, out + n, out_stride, add);
}

template <typename A, int M = ROWS>
inline void product_piece(Left<A> left, Right<A> right, int64_t rows, int64_t depth, int64_t columns, A* out,
                          int64_t out_stride, bool add) {
  for (; rows >= M; rows -= M, left.data += M * left.row, out += M * out_stride)
    product_rows<A, M>(left, right, depth, columns, out, out_stride, add);
  if constexpr (M > 1)
    if (rows > 0) product_piece<A, M / 2>(left, right, rows, depth, columns, out, out_stride, add);
}

// `columns` is a multiple of 16. Long sums are taken in pieces, and each by itself before it is added: rounding errors
// grow with the number of additions one after the other.
template <typename A>
void product(Left<A> left, Right<A> right, int64_t rows, int64_t depth, int64_t columns, A* out, int64_t out_stride,
             bool add) {
  constexpr int64_t PIECE = 128;
  for (int64_t k = 0; k < depth; k += PIECE)
    product_piece<A>({left.data + k * left.step, left.row, left.step}, {right.data + k * right.stride, right.stride},
                     rows, depth - k < PIECE ? depth - k : PIECE, columns, out, out_stride, add || k > 0);
}

}  // namespace
