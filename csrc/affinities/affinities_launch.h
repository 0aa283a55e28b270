// Which CUDA kernels the operations on affinities run, over which grids. Torch-free: `launch(kernel, grid_x, grid_y,
// threads, shared_bytes, params)` starts them on a GPU (common/launch.h) or on the emulation (tests/emulation).
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "adaptive_context_mma.cuh"
#include "affinity_moments_mma.cuh"

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

// The header, a tile of a map, and one of numbers of positions and regions.
inline int tile_bytes(const AffinitiesCuda& p) {
  const int most = *std::max_element(p.sizes, p.sizes + p.num_scales);
  return HEADER_BYTES + map_tile_bytes(p.padded) + region_tile_bytes(fragment_rows(most));
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

template <typename T, typename Launch>
void launch_pack_fragments(const AdaptiveContextCuda& p, const Launch& launch) {
  const int rows = p.batch * p.num_scales;
  launch_pack_fragments<T>(p, {p.regions, p.packed_regions, p.region_pairs, p.regions == nullptr ? 0 : p.batch},
                           {p.shift, p.padded_shift, p.shift == nullptr ? 0 : rows},
                           {p.constant, p.padded_constant, p.constant == nullptr ? 0 : rows}, launch);
}

template <typename Launch>
void launch_merges(std::initializer_list<Slices> merges, const Launch& launch) {
  MergeCuda p{};
  int64_t blocks = 0;
  std::copy(merges.begin(), merges.end(), p.of);
  for (Slices& s : p.of) {
    s.vectors = s.pitch % VECTOR == 0 && s.columns % VECTOR == 0 && reinterpret_cast<uintptr_t>(s.to) % 16 == 0;
    const int columns = MERGE_LANES * (s.vectors ? VECTOR : 1);
    s.across = (s.columns + columns - 1) / columns;
    const int64_t own = int64_t(s.results) * s.rows * s.across;
    s.blocks = int(own), blocks += own;
  }
  if (blocks > INT32_MAX) throw std::runtime_error("the gradients have too many rows for the CUDA kernels' grids");
  launch(merge_slices, int(blocks), 1, MERGE_LANES * MERGE_PARTS, MERGE_SHARED_BYTES, p);
}

template <typename T, typename Launch>
void launch_aggregate(AdaptiveContextCuda p, const Launch& launch) {
  if constexpr (sizeof(T) == 2) {
    launch_pack_fragments<T>(p, launch);
    p.vectors = in_vectors<T>(p, {p.x, p.z});
    launch(aggregate_mma<T>, blocks(p), 1, WARP_THREADS, map_tile_bytes(p.padded), p);
  } else {
    launch_pack(p, p.regions, p.packed_regions, launch);
    launch(in_vectors<T>(p, {p.x, p.z}) ? aggregate<VECTOR> : aggregate<1>, blocks(p), 1, THREADS, Shared::BYTES, p);
  }
}

template <typename T, typename Launch>
void launch_region_gradients(AdaptiveContextCuda p, const Launch& launch) {
  const int channels = p.num_scales * p.channels;
  Slices shifts{p.shift_slices, p.grad_shift, p.batch, p.chunks * SHIFT_PARTS, 1, channels, channels};
  if constexpr (sizeof(T) == 2) {
    launch_pack_fragments<T>(p, launch);
    p.vectors = in_vectors<T>(p, {p.x, p.grad});
    launch(sum_region_gradients_mma<T>, blocks(p), 1, WARP_THREADS, tile_bytes(p), p);
    shifts = {p.shift_slices, p.grad_shift, p.batch, p.chunks, p.num_scales, p.padded, p.channels};
  } else {
    launch_pack(p, p.regions, p.packed_regions, launch);
    const auto kernel = in_vectors<T>(p, {p.x, p.grad}) ? sum_region_gradients<VECTOR> : sum_region_gradients<1>;
    launch(kernel, blocks(p), 1, THREADS, Shared::BYTES, p);
  }
  launch_merges({{p.matrix_slices, p.grad_regions, p.batch, p.chunks, p.rows, p.padded, p.channels},
                 shifts,
                 {p.bias_slices, p.grad_bias, p.batch, p.chunks * ROW_PARTS, 1, p.rows, p.rows},
                 {p.slope_slices, p.slope, p.batch, p.chunks * ROW_PARTS, 1, p.rows, p.rows},
                 {p.pair_slices, p.slope_moments, p.batch, p.chunks, 1, p.pairs, p.pairs}},
                launch);
}

template <typename T, typename Launch>
void launch_x_gradients(AdaptiveContextCuda p, const Launch& launch) {
  if constexpr (sizeof(T) == 2) {
    launch_pack_fragments<T>(p, launch);
    p.vectors = in_vectors<T>(p, {p.x, p.grad, p.grad_x});
    launch(write_x_gradients_mma<T>, blocks(p), 1, WARP_THREADS, tile_bytes(p), p);
  } else {
    launch_pack(p, p.regions, p.packed_regions, launch);
    const auto kernel = in_vectors<T>(p, {p.x, p.grad, p.grad_x}) ? write_x_gradients<VECTOR> : write_x_gradients<1>;
    launch(kernel, blocks(p), 1, THREADS, Shared::BYTES, p);
  }
  launch_merges({{p.matrix_slices, p.grad_weight, 1, p.batch * p.chunks, p.rows, p.padded, p.channels},
                 {p.bias_slices, p.grad_bias, p.batch, p.chunks * ROW_PARTS, 1, p.rows, p.rows}},
                launch);
}

template <typename T, typename Launch>
void launch_moments(AffinityMomentsCuda p, const Launch& launch) {
  if constexpr (sizeof(T) == 2) {
    launch_pack_fragments<T>(p, {}, {}, {}, launch);
    const int most = *std::max_element(p.sizes, p.sizes + p.num_scales);
    const int bytes = std::max(map_tile_bytes(p.padded), deviation_bytes(fragment_rows(most)));
    p.vectors = in_vectors<T>(p, {p.x});
    launch(sum_moments_mma<T>, blocks(p), 1, WARP_THREADS, ORIGIN_BYTES + bytes, p);
  } else {
    launch_pack(p, nullptr, nullptr, launch);
    launch(in_vectors<T>(p, {p.x}) ? sum_moments<VECTOR> : sum_moments<1>, blocks(p), 1, THREADS,
           SUM_MOMENTS_SHARED_BYTES, p);
  }
  int stretches = 0;
  for (int k = 0; k < p.num_scales; ++k) stretches += stretches_of_pairs(p.sizes[k]);
  launch(merge_moments, p.batch, stretches, MERGE_THREADS, MERGE_MOMENTS_SHARED_BYTES, p);
}
