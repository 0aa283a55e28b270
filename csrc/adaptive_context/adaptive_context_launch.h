// Which CUDA kernels adaptive_context runs, over which grids. Torch-free: `launch(kernel, grid_x, grid_y, threads,
// shared_bytes, params)` starts them on a GPU (adaptive_context.cu) or on the emulation (tests/emulation).
#pragma once

#include "../common/affinities_launch.h"
#include "adaptive_context.cuh"

// Lays the workspace out, or counts its bytes where memory is null. size: of the map's scalars.
inline int64_t arrange(AdaptiveContextCuda& p, void* memory, size_t size) {
  Workspace workspace(memory);
  const int64_t slices = int64_t(p.batch) * p.chunks, channels = int64_t(p.num_scales) * p.channels;
  workspace.take(p.packed_weight, int64_t(p.rows) * p.padded, size);
  if (p.regions != nullptr) workspace.take(p.packed_regions, int64_t(p.batch) * p.rows * p.padded, size);
  if (p.grad_bias != nullptr) {
    workspace.take(p.matrix_slices, slices * p.rows * p.padded, sizeof(float));
    workspace.take(p.bias_slices, slices * ROW_PARTS * p.rows, sizeof(float));
  }
  if (p.grad_regions != nullptr) {
    workspace.take(p.shift_slices, slices * shift_parts(size) * channels, sizeof(float));
    workspace.take(p.slope_slices, slices * ROW_PARTS * p.rows, sizeof(float));
    workspace.take(p.pair_slices, slices * p.pairs, sizeof(float));
  }
  return workspace.bytes();
}

template <typename Launch>
void launch_merges(const MergeCuda& merges, int count, const Launch& launch) {
  int64_t blocks = 1;
  for (const Slices& s : merges.of)
    blocks = std::max(blocks, int64_t(s.results) * s.rows * ((s.columns + MERGE_COLUMNS - 1) / MERGE_COLUMNS));
  if (blocks > INT32_MAX) throw std::runtime_error("the gradients have too many rows for the CUDA kernels' grids");
  launch(merge_slices, int(blocks), count, MERGE_COLUMNS * MERGE_PARTS, MERGE_SHARED_BYTES, merges);
}

template <typename T, typename Launch>
void launch_aggregate(const AdaptiveContextCuda& p, const Launch& launch) {
  launch_pack<T>(p, p.regions, p.packed_regions, launch);
  constexpr int V = VECTOR<T>;
  launch(choose_kernel<T>(p, {p.x, p.z}, aggregate<T, V, true>, aggregate<T, V, false>, aggregate<T, 1, true>),
         blocks(p), 1, THREADS, Shared<T>::BYTES, p);
}

template <typename T, typename Launch>
void launch_region_gradients(const AdaptiveContextCuda& p, const Launch& launch) {
  launch_pack<T>(p, p.regions, p.packed_regions, launch);
  constexpr int V = VECTOR<T>;
  const auto kernel = choose_kernel<T>(p, {p.x, p.grad}, sum_region_gradients<T, V, true>,
                                       sum_region_gradients<T, V, false>, sum_region_gradients<T, 1, true>);
  launch(kernel, blocks(p), 1, THREADS, BACKWARD_SHARED_BYTES<T>, p);
  const int channels = p.num_scales * p.channels;
  launch_merges({{{p.matrix_slices, p.grad_regions, p.batch, p.chunks, p.rows, p.padded, p.channels},
                  {p.shift_slices, p.grad_shift, p.batch, p.chunks * shift_parts(sizeof(T)), 1, channels, channels},
                  {p.bias_slices, p.grad_bias, p.batch, p.chunks * ROW_PARTS, 1, p.rows, p.rows},
                  {p.slope_slices, p.slope, p.batch, p.chunks * ROW_PARTS, 1, p.rows, p.rows},
                  {p.pair_slices, p.slope_moments, p.batch, p.chunks, 1, p.pairs, p.pairs}}},
                5, launch);
}

template <typename T, typename Launch>
void launch_x_gradients(const AdaptiveContextCuda& p, const Launch& launch) {
  launch_pack<T>(p, p.regions, p.packed_regions, launch);
  constexpr int V = VECTOR<T>;
  const auto kernel = choose_kernel<T>(p, {p.x, p.grad, p.grad_x}, write_x_gradients<T, V, true>,
                                       write_x_gradients<T, V, false>, write_x_gradients<T, 1, true>);
  launch(kernel, blocks(p), 1, THREADS, BACKWARD_SHARED_BYTES<T>, p);
  launch_merges({{{p.matrix_slices, p.grad_weight, 1, p.batch * p.chunks, p.rows, p.padded, p.channels},
                  {p.bias_slices, p.grad_bias, p.batch, p.chunks * ROW_PARTS, 1, p.rows, p.rows}}},
                2, launch);
}
