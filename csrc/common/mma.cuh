// Tensor cores, and the only PTX here: products of bfloat16 and float16 matrices in shared memory, summed in float32.
//
// A warp multiplies 16x16 by 16x8. Lane l holds of each matrix the pieces that follow from g = l / 4 and t = l % 4:
//
//   a, 16 x 16: four pairs, rows g and g + 8, columns 2t and 2t + 1 of the left half, then the same of the right one
//   b, 16 x 8: two pairs, rows 2t and 2t + 1 of the upper half, then of the lower one, column g
//   c, 16 x 8: four numbers, row g, columns 2t and 2t + 1, then the same of row g + 8
//
// Every function is called by all lanes of a warp together. tests/emulation/emulated_mma.h has its twins.
#pragma once

#include <type_traits>

#include "device.cuh"

#ifdef __CUDACC__

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8, 16 bytes in a row. It
// gets numbers 2t and 2t + 1 of row g of each matrix, or of each one's transpose.
template <bool transposed>
static __device__ __forceinline__ void load_matrices(uint32_t (&parts)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#define APC_LDMATRIX(TRANSPOSED)                                                                \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANSPOSED ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])                 \
               : "r"(address)                                                                   \
               : "memory")
  if constexpr (transposed)
    APC_LDMATRIX(".trans");
  else
    APC_LDMATRIX("");
}

// d = a * b + c
template <typename T>
static __device__ __forceinline__ void multiply_add(float* d, const uint32_t (&a)[4], const uint32_t* b,
                                                    const float* c) {
  static_assert(sizeof(T) == 2);
#define APC_MMA(TYPE)                                                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                               \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                           \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                 "f"(c[3]))
  if constexpr (std::is_same_v<T, BFloat16>)
    APC_MMA("bf16");
  else
    APC_MMA("f16");
}

// c += a * b of float64, 8x8 by sums over 4: lane l holds row g, column t of a, column g, row t of b, and row g,
// columns 2t and 2t + 1 of c.
static __device__ __forceinline__ void multiply_add(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

// Begins to copy 16 bytes, or 16 zeros, into shared memory. They are there, for this thread, after wait_for_copies.
static __device__ __forceinline__ void begin_copy(void* to, const void* from, bool inside) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
static __device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// Makes the compiler believe that the value is another one.
static __device__ __forceinline__ void forget(int& value) { asm volatile("" : "+r"(value)); }

// The larger one; NaN where one is.
static __device__ __forceinline__ float larger(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Off by 2 units in the last place at most.
static __device__ __forceinline__ float exponential(float value) { return __expf(value); }

// 1 / value for normal numbers, off by one unit in the last place at most.
static __device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

#else

#include "emulated_mma.h"

#endif

// c += a * b
template <typename T>
static __device__ __forceinline__ void multiply_add(float* c, const uint32_t (&a)[4], const uint32_t* b) {
  multiply_add<T>(c, a, b, c);
}

// The pieces of a 16x16 matrix a whose first number is at `from`, stored row by row (or column by column), `pitch`
// numbers apart. Rows start at multiples of 16 bytes.
template <bool by_row, typename T>
static __device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* from, int pitch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, i = lane % 8, right = lane / 16 * 8, lower = lane / 8 % 2 * 8;
  load_matrices<!by_row>(a, from + (by_row ? (lower + i) * pitch + right : (right + i) * pitch + lower));
}

// The pieces of two matrices b side by side, 16x16 together, likewise: b[0] and b[1] of the left one, b[2] and b[3] of
// the right one.
template <bool by_row, typename T>
static __device__ __forceinline__ void load_two_b(uint32_t (&b)[4], const T* from, int pitch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, i = lane % 8, right = lane / 16 * 8, lower = lane / 8 % 2 * 8;
  load_matrices<by_row>(b, from + (by_row ? (lower + i) * pitch + right : (right + i) * pitch + lower));
}
