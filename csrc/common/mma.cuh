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

// c += a * b
template <typename T>
static __device__ __forceinline__ void multiply_add(float* c, const uint32_t (&a)[4], const uint32_t* b) {
  static_assert(sizeof(T) == 2);
#define APC_MMA(TYPE)                                                                 \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, BFloat16>)
    APC_MMA("bf16");
  else
    APC_MMA("f16");
}

#else

#include "emulated_mma.h"

#endif

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
