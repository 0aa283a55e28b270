// Which CUDA kernels adaptive_context runs, over which grids.
#pragma once

#include <stdexcept>

#include "adaptive_context_mma.cuh"
#include "affinities_launch.h"

// The header, a tile of a map, and one of numbers of positions and regions.
inline int tile_bytes(const AffinitiesCuda& p) {
  const int most = *std::max_element(p.sizes, p.sizes + p.num_scales);
  return HEADER_BYTES + map_tile_bytes(p.padded) + region_tile_bytes(fragment_rows(most));
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
