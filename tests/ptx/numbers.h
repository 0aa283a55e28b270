// The numbers of PTX: bits of registers as values of a type and back, float16 and bfloat16, rounding, NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ptx {

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A register of 64 bits read as a T: its low bits.
template <typename T>
T value_of(uint64_t bits) {
  if constexpr (sizeof(T) == 8)
    return bits_as<T>(bits);
  else if constexpr (sizeof(T) == 4)
    return bits_as<T>(static_cast<uint32_t>(bits));
  else if constexpr (sizeof(T) == 2)
    return bits_as<T>(static_cast<uint16_t>(bits));
  else
    return bits_as<T>(static_cast<uint8_t>(bits));
}

// Signed integers are extended by their sign, as loads and conversions into wider registers demand; the rest by zeros.
template <typename T>
uint64_t bits_of(T value) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<uint64_t>(static_cast<int64_t>(value)) &
           (std::is_signed_v<T> ? ~0ull : ~0ull >> (64 - 8 * sizeof(T)));
  else if constexpr (sizeof(T) == 8)
    return bits_as<uint64_t>(value);
  else
    return bits_as<uint32_t>(value);
}

// The NaN that arithmetic in float32 results in, whatever NaN went in.
inline float canonical(float value) { return value != value ? bits_as<float>(0x7fffffffu) : value; }
inline double canonical(double value) { return value; }

// Subnormal numbers become zeros of their sign.
inline float flushed(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  return (bits & 0x7f800000u) == 0 ? bits_as<float>(bits & 0x80000000u) : value;
}

inline float from_bfloat16(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bfloat16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = bits_as<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) {
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits_as<float>(sign | ((rest + 0x1c000u) << 13));
}

inline uint16_t to_float16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above
  if (magnitude < 0x38800000u)                          // below 2^-14: the sum's last place is that of a subnormal
    return sign | static_cast<uint16_t>(bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u);
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace ptx
