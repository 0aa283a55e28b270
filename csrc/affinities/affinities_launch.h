// What the launches of adaptive_context and affinity_moments share: whether maps move in vectors, small matrices
// packed. Torch-free: `launch(kernel, grid_x, grid_y, threads, shared_bytes, params)` starts a kernel on a GPU
// (common/launch.h) or on the emulation (tests/emulation).
#pragma once

#include <algorithm>
#include <initializer_list>

#include "fragments.cuh"
#include "tiles.cuh"

inline int blocks(const AffinitiesCuda& p) { return p.batch * p.num_scales * p.chunks; }

// Whether every map that is given moves in vectors of 16 bytes: each lies in one pixel's channels of a scale, and
// starts at a multiple of its size.
template <typename T>
bool in_vectors(const AffinitiesCuda& p, std::initializer_list<MapCuda> maps) {
  constexpr int V = 16 / sizeof(T);
  return std::all_of(maps.begin(), maps.end(), [&](const MapCuda& map) {
    return map.data == nullptr || (map.stride_c == 1 && p.channels % V == 0 && map.stride_x % V == 0 &&
                                   (map.width == p.positions || map.stride_y % V == 0) && map.stride_b % V == 0 &&
                                   reinterpret_cast<uintptr_t>(map.data) % 16 == 0);
  });
}

// Pads the rows of weight, and of regions if there are any.
template <typename Launch>
void launch_pack(const AffinitiesCuda& p, const float* regions, void* packed_regions, const Launch& launch) {
  const int rows = regions == nullptr ? 0 : p.batch * p.rows;
  const PackCuda pack{{p.weight, regions}, {p.packed_weight, packed_regions}, {p.rows, rows}, p.channels, p.padded};
  launch(pack_rows, p.rows + rows, 1, THREADS, 0, pack);
}

// Packs the weight, and what else is given.
template <typename T, typename Launch>
void launch_pack_fragments(const AffinitiesCuda& p, PackFragments::Matrix regions, PackFragments::VectorRows shift,
                           PackFragments::VectorRows constant, const Launch& launch) {
  PackFragments pack{{{p.weight, p.packed_weight, p.weight_pairs, 1}, regions},
                     {shift, constant},
                     {},
                     p.rows,
                     p.fragment_rows,
                     p.channels,
                     p.padded};
  std::copy(p.sizes, p.sizes + MAX_SCALES, pack.sizes);
  launch(pack_fragments<T>, (1 + regions.images) * p.fragment_rows + shift.rows + constant.rows, 1, 32 * PACK_WARPS, 0,
         pack);
}
