// What CUDA kernel bodies are written in: scalar conversions, vector access, shared memory. A body includes this file
// and no torch or CUDA header, so that g++ compiles it too, against the emulation in tests/emulation, and runs it on a
// CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using BFloat16 = __nv_bfloat16;
using Half = __half;

static __device__ __forceinline__ float load(float value) { return value; }
static __device__ __forceinline__ float load(BFloat16 value) { return __bfloat162float(value); }
static __device__ __forceinline__ float load(Half value) { return __half2float(value); }

template <typename T>
static __device__ __forceinline__ T round_to(float value) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return __float2bfloat16_rn(value);
  else if constexpr (std::is_same_v<T, Half>)
    return __float2half_rn(value);
  else
    return value;
}

// Two 16-bit numbers in 32 bits, the first in the lower half.
template <typename T>
static __device__ __forceinline__ uint32_t round_pair(float lower, float upper) {
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lower, upper);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(lower, upper);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}
template <typename T>
static __device__ __forceinline__ float lower_of(uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return __uint_as_float(pair << 16);
  else
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
}
template <typename T>
static __device__ __forceinline__ float upper_of(uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return __uint_as_float(pair & 0xffff0000u);
  else
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

#define check_alignment(address, bytes)  // the emulation's; a GPU faults by itself

// The one shared buffer of a kernel; its size is the launch's.
#define SHARED_BUFFER(name) extern __shared__ __align__(16) unsigned char name[]

#else

#include "emulation.h"

#endif

// V scalars side by side, read and written in one instruction of up to 16 bytes.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

template <int V, typename T>
static __device__ __forceinline__ Vector<T, V> load_vector(const T* from) {
  check_alignment(from, sizeof(Vector<T, V>));
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <int V, typename T>
static __device__ __forceinline__ void store_vector(T* to, const Vector<T, V>& vector) {
  check_alignment(to, sizeof(Vector<T, V>));
  *reinterpret_cast<Vector<T, V>*>(to) = vector;
}
