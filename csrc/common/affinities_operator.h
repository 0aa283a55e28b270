// From tensors to the description that the CPU kernels on affinities work by.
#pragma once

#include <algorithm>

#include "../adaptive_context/operators.h"
#include "affinities.h"
#include "scalar_of.h"

inline Map describe_map(const Tensor& map) {
  Map m{map.data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.stride(3), map.size(2), map.size(3)};
  if (m.width == 1 && m.stride_c != 1) m.stride_x = 1;  // the stride of a single column says nothing
  if (m.height == 1 || m.stride_y == m.width * m.stride_x) m.width *= m.height, m.height = 1;
  return m;
}

// Chunks of four tiles at least, so that a chunk's sums are worth keeping; at most 32 of an image; one where sums are
// large.
inline int64_t count_chunks(int64_t positions, const Scales& scales) {
  const int64_t largest = *std::max_element(scales.begin(), scales.end()), tiles = (positions + TILE - 1) / TILE;
  return largest * largest > SMALL_REGIONS ? 1 : std::clamp<int64_t>(tiles / 4, 1, 32);
}

inline Affinities describe_affinities(const Tensor& x, const Tensor& weight, const Tensor& bias, const Scales& scales) {
  const AffinitySizes sizes = check_affinities(x, weight, bias, scales);
  isa();  // a wrong APC_KERNELS_ISA is reported from here, not from inside a thread
  Affinities a{};
  a.scalar = scalar_of(x, "x");
  a.batch = sizes.batch, a.channels = sizes.channels, a.rows = sizes.rows, a.pairs = sizes.pairs;
  a.positions = x.size(2) * x.size(3);
  a.num_scales = static_cast<int>(scales.size()), a.scales = scales.data();
  a.chunks = count_chunks(a.positions, scales);
  a.x = describe_map(x);
  a.weight = weight.data_ptr(), a.bias = bias.data_ptr();
  return a;
}

inline int64_t units(const Affinities& a) { return a.chunks * a.batch * a.num_scales; }

inline int64_t most_regions(const Affinities& a) {
  const int64_t largest = *std::max_element(a.scales, a.scales + a.num_scales);
  return largest * largest;
}
