// Vectors of the instruction set's width, in the compiler's extension, and transposes in registers: square blocks of
// one vector's width.
#pragma once

#include <utility>

#include "kernel_cpu.h"

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ROWS = 8;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, ROWS = 4;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, ROWS = 8;
#else
constexpr int VECTOR_BYTES = 16, ROWS = 4;
#endif

template <typename A>
struct Pack {
  typedef A type __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(A)), may_alias));
  static constexpr int width = VECTOR_BYTES / sizeof(A);
};

// One step of a transpose: rows r and r + STEP exchange the blocks of STEP elements off their diagonal.
template <typename A, int STEP, int... K>
inline void exchange(typename Pack<A>::type& upper, typename Pack<A>::type& lower, std::integer_sequence<int, K...>) {
  constexpr int W = Pack<A>::width;
  const typename Pack<A>::type first = upper, second = lower;
  upper = __builtin_shufflevector(first, second, ((K & STEP) ? W + K - STEP : K)...);
  lower = __builtin_shufflevector(first, second, ((K & STEP) ? W + K : K + STEP)...);
}

template <typename A, int STEP>
inline void transpose_rows(typename Pack<A>::type* rows) {
  constexpr int W = Pack<A>::width;
  if constexpr (STEP < W) {
    for (int r = 0; r < W; ++r)
      if ((r & STEP) == 0) exchange<A, STEP>(rows[r], rows[r + STEP], std::make_integer_sequence<int, W>{});
    transpose_rows<A, 2 * STEP>(rows);
  }
}

// Vectors of A from and to memory of another type.
template <typename A, typename T>
inline typename Pack<A>::type load_vector(const T* from) {
  A wide[Pack<A>::width];
  for (int k = 0; k < Pack<A>::width; ++k) wide[k] = load(from[k]);
  return *reinterpret_cast<const typename Pack<A>::type*>(wide);
}

template <typename A, typename T>
inline void store_vector(T* to, typename Pack<A>::type vector) {
  A wide[Pack<A>::width];
  *reinterpret_cast<typename Pack<A>::type*>(wide) = vector;
  for (int k = 0; k < Pack<A>::width; ++k) to[k] = round_to<T>(wide[k]);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns; A is what is computed in.
template <typename A, typename From, typename To>
void transpose(const From* from, int64_t from_stride, int64_t rows, int64_t columns, To* to, int64_t to_stride) {
  constexpr int W = Pack<A>::width;
  const int64_t whole_rows = rows / W * W, whole_columns = columns / W * W;
  for (int64_t i = 0; i < whole_rows; i += W) {
    for (int64_t j = 0; j < whole_columns; j += W) {
      typename Pack<A>::type block[W];
      for (int r = 0; r < W; ++r) block[r] = load_vector<A>(from + (i + r) * from_stride + j);
      transpose_rows<A, 1>(block);
      for (int r = 0; r < W; ++r) store_vector<A>(to + (j + r) * to_stride + i, block[r]);
    }
    for (int64_t j = whole_columns; j < columns; ++j)
      for (int r = 0; r < W; ++r) to[j * to_stride + i + r] = round_to<To>(load(from[(i + r) * from_stride + j]));
  }
  for (int64_t i = whole_rows; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = round_to<To>(load(from[i * from_stride + j]));
}

// The sum of a[n] * b[n], kept in S, in lanes that vectorise.
template <typename S, typename A, typename B>
inline S dot(const A* a, const B* b, int64_t length) {
  constexpr int LANES = 16;
  S lanes[LANES] = {};
  int64_t n = 0;
  for (; n + LANES <= length; n += LANES)
    for (int i = 0; i < LANES; ++i) lanes[i] += static_cast<S>(a[n + i]) * b[n + i];
  for (int i = 0; n + i < length; ++i) lanes[i] += static_cast<S>(a[n + i]) * b[n + i];
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace
