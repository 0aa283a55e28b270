// What CPU kernels are written in: maps, numbers, scratch memory. float16 and bfloat16 are bit patterns, converted
// without branches so that loops over them vectorise.
//
// Whatever has code sits in an anonymous namespace: the file is compiled for several instruction sets, and the linker
// must never take one set's copy of an inline function for another's.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

enum class Scalar { float32, float64, bfloat16, float16 };

// A map (batch, channels, height, width); strides in elements.
struct Map {
  void* data;
  int64_t stride_b, stride_c, stride_y, stride_x, height, width;
};

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The type sums are kept in.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }
inline float load(Half value) {
  // Exponent and mantissa move into float's places; a product with 2^112 then mends the bias, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t special = (value.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  return as_float(as_bits(as_float(magnitude) * 0x1p112f) | special | sign);
}

template <typename T, typename A>
inline T round_to(A value) {
  return static_cast<T>(value);
}
template <>
inline BFloat16 round_to<BFloat16, float>(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
inline Half round_to<Half, float>(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // Adding a float whose last place is the result's last place lets the processor do the rounding: 2^(e+13) for a
  // normal result with exponent e, 2^-1 (whose last place is 2^-24) for a subnormal one.
  const uint32_t exponent = magnitude & 0x7f800000u;
  const uint32_t anchor = exponent < 0x38800000u ? 0x3f000000u : exponent + (13u << 23);
  const float anchored = as_float(magnitude) + as_float(anchor);
  const uint32_t steps = as_bits(anchored) - anchor;  // the magnitude in units of the result's last place
  const uint32_t normal = (((exponent >> 23) - 112u) << 10) + steps - 0x400u;
  const uint32_t finite = exponent < 0x38800000u ? steps : normal;
  const uint32_t result = magnitude > 0x7f800000u ? 0x7e00u : magnitude >= 0x477ff000u ? 0x7c00u : finite;
  return {static_cast<uint16_t>(result | sign)};
}

template <typename T>
inline const T* as(const void* numbers, int64_t offset = 0) {
  return static_cast<const T*>(numbers) + offset;
}
template <typename T>
inline T* as(void* numbers, int64_t offset = 0) {
  return static_cast<T*>(numbers) + offset;
}

// A small array on the heap, freed at the end of the scope. (std::vector's inline functions would be shared between
// instruction sets.)
template <typename T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count) : data(static_cast<T*>(__builtin_malloc(count * sizeof(T) + 1))) {
    if (data == nullptr) __builtin_abort();
  }
  ~Scratch() { __builtin_free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data; }
};

}  // namespace
