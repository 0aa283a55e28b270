// What vectors (vectors_cpu.h) need besides arithmetic: integers of the same shape, exponentials, permutations.
#pragma once

#include "vectors_cpu.h"

namespace {

template <typename A>
struct Integers {
  using scalar = std::conditional_t<std::is_same_v<A, float>, int32_t, int64_t>;
  using type = typename Pack<scalar>::type;
};

template <typename A>
inline typename Pack<A>::type load_lanes(const A* from) {
  return *reinterpret_cast<const typename Pack<A>::type*>(from);
}
template <typename A>
inline void store_lanes(A* to, typename Pack<A>::type lanes) {
  *reinterpret_cast<typename Pack<A>::type*>(to) = lanes;
}
// The first `count` lanes only.
template <typename A>
inline void store_lanes(A* to, typename Pack<A>::type lanes, int64_t count) {
  if (count == Pack<A>::width) return store_lanes<A>(to, lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// Lane i of the result is lane order[i] of the values.
template <typename A>
inline typename Pack<A>::type permute(typename Pack<A>::type values, typename Integers<A>::type order) {
#if defined(__clang__)
  typename Pack<A>::type result;
  for (int i = 0; i < Pack<A>::width; ++i) result[i] = values[order[i]];
  return result;
#else
  return __builtin_shuffle(values, order);
#endif
}

// exp(t) for t <= 0 or a rounding error above it: within one unit in the last place, 0 below exp(-87). A
// NaN stays one, or becomes 0 where NAN_IS_ZERO.
template <bool NAN_IS_ZERO = false>
inline typename Pack<float>::type exp_lanes(typename Pack<float>::type t) {
  typedef typename Pack<float>::type Vec;
  typedef typename Integers<float>::type Int;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its last bits then hold
  const Vec shifted = t * 1.44269504f + magic;
  const Vec r = t * 1.44269504f - (shifted - magic);  // in [-1/2, 1/2]: 2^r by a polynomial fitted there
  Vec sum = r * 1.5353362e-4f + 1.33988750e-3f;
  sum = sum * r + 9.61843692e-3f;
  sum = sum * r + 5.55033237e-2f;
  sum = sum * r + 2.40226477e-1f;
  sum = sum * r + 6.93147182e-1f;
  sum = sum * r + 1.0f;
  const Int scaled = reinterpret_cast<Int>(sum) + (reinterpret_cast<Int>(shifted) << 23);
  const Vec result = reinterpret_cast<Vec>(scaled);
  return NAN_IS_ZERO ? (t >= -87.0f ? result : Vec{}) : (t < -87.0f ? Vec{} : result);
}
template <bool NAN_IS_ZERO = false>
inline typename Pack<double>::type exp_lanes(typename Pack<double>::type t) {
  for (int i = 0; i < Pack<double>::width; ++i) t[i] = NAN_IS_ZERO && t[i] != t[i] ? 0 : __builtin_exp(t[i]);
  return t;
}

// log(x) for normal x > 0, within two units in the last place.
inline typename Pack<float>::type log_lanes(typename Pack<float>::type x) {
  typedef typename Pack<float>::type Vec;
  typedef typename Integers<float>::type Int;
  const Int bits = reinterpret_cast<Int>(x) - 0x3f3504f3;  // x = 2^exponent * (1 + r), 1 + r in [sqrt(1/2), sqrt(2))
  const Vec exponent = __builtin_convertvector(bits >> 23, Vec);
  const Vec r = reinterpret_cast<Vec>((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec sum = r * 7.0376836292e-2f - 1.1514610310e-1f;
  sum = sum * r + 1.1676998740e-1f;
  sum = sum * r - 1.2420140846e-1f;
  sum = sum * r + 1.4249322787e-1f;
  sum = sum * r - 1.6668057665e-1f;
  sum = sum * r + 2.0000714765e-1f;
  sum = sum * r - 2.4999993993e-1f;
  sum = sum * r + 3.3333331174e-1f;
  const Vec square = r * r;
  const Vec small = sum * r * square - exponent * 2.12194440e-4f - 0.5f * square;  // ln 2 in two parts
  return x == x ? r + small + exponent * 0.693359375f : x;
}
inline typename Pack<double>::type log_lanes(typename Pack<double>::type x) {
  for (int i = 0; i < Pack<double>::width; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

}  // namespace
