// Twins of the PTX in csrc/common/mma.cuh: what all lanes of a warp do together.
#pragma once

#include <cmath>

#include "emulation.h"

namespace emulation {

// What every lane of a warp has to offer, after all of them have offered it. Two sets of places take turns: a lane that
// is already at the next exchange cannot spoil what another has yet to read.
template <typename Offer>
const Offer* exchange(const Offer& offer) {
  struct Places {
    Offer offers[2][1024];
    unsigned turn[1024];
  };
  static Places places;
  const unsigned thread = running, turn = places.turn[thread]++ % 2;
  places.offers[turn][thread] = offer;
  wait(State::at_warp_barrier);
  return places.offers[turn] + thread / WARP * WARP;
}

template <typename T>
float number(const uint32_t* parts, int i) {  // the i-th 16-bit number
  return load(T{static_cast<uint16_t>(parts[i / 2] >> (i % 2 * 16))});
}

// A copy into shared memory on its way: it arrives when its thread waits for it.
struct Copy {
  void* to;
  const void* from;
};
inline std::vector<Copy> copies[1024];

}  // namespace emulation

inline void begin_copy(void* to, const void* from, bool inside) {
  check_alignment(to, 16);
  if (inside) check_alignment(from, 16);
  std::memset(to, emulation::POISON, 16);
  emulation::copies[emulation::running].push_back({to, inside ? from : nullptr});
}

inline void wait_for_copies() {
  for (const auto& [to, from] : emulation::copies[emulation::running])
    from ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
  emulation::copies[emulation::running].clear();
}

inline void forget(int&) {}
inline float reciprocal(float value) { return 1 / value; }
// A GPU has the power of two alone.
inline float exponential(float value) { return static_cast<float>(std::exp2(double(value * 1.44269504f))); }
inline float larger(float a, float b) { return a != a || a > b ? a : b; }

template <typename T>
uint32_t round_pair(float lower, float upper) {
  return round_to<T>(lower).bits | static_cast<uint32_t>(round_to<T>(upper).bits) << 16;
}
template <typename T>
float lower_of(uint32_t pair) {
  return load(T{static_cast<uint16_t>(pair)});
}
template <typename T>
float upper_of(uint32_t pair) {
  return load(T{static_cast<uint16_t>(pair >> 16)});
}

// Stricter than ldmatrix, which has read when it ends: no lane may write there before the next barrier.
template <bool transposed>
void load_matrices(uint32_t (&parts)[4], const void* row) {
  check_alignment(row, 16);
  const void* const* rows = emulation::exchange(row);
  const unsigned lane = emulation::running % emulation::WARP, g = lane / 4, t = lane % 4;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const auto at = [&](unsigned i, unsigned j) -> uint32_t {
      return static_cast<const uint16_t*>(rows[8 * matrix + i])[j];
    };
    parts[matrix] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
  }
}

template <typename T>
void multiply_add(float* d, const uint32_t (&a)[4], const uint32_t* b, const float* c) {
  struct Pieces {
    uint32_t a[4], b[2];
  };
  const Pieces* lanes = emulation::exchange(Pieces{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const unsigned lane = emulation::running % emulation::WARP, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * t + i % 2, lower = i / 2;
    double sum = 0;  // 16 products of 11 bits each, rounded once with what they are added to
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t left = lanes[4 * g + k % 8 / 2].a[k / 8 * 2 + lower];
      const uint32_t upper = lanes[4 * column + k % 8 / 2].b[k / 8];
      sum += static_cast<double>(emulation::number<T>(&left, k % 2)) * emulation::number<T>(&upper, k % 2);
    }
    d[i] = static_cast<float>(c[i] + sum);
  }
}

inline void multiply_add(double (&c)[2], double a, double b) {
  struct Pieces {
    double a, b;
  };
  const Pieces* lanes = emulation::exchange(Pieces{a, b});
  const unsigned lane = emulation::running % emulation::WARP, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 2; ++i)
    for (unsigned k = 0; k < 4; ++k) c[i] = std::fma(lanes[4 * g + k].a, lanes[4 * (2 * t + i) + k].b, c[i]);
}
