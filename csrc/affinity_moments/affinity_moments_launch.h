// Which CUDA kernels affinity_moments runs, over which grids. Torch-free, as adaptive_context_launch.h.
#pragma once

#include "../common/affinities_launch.h"
#include "affinity_moments.cuh"

inline int64_t arrange(AffinityMomentsCuda& p, void* memory, size_t size) {
  Workspace workspace(memory);
  const int64_t slices = int64_t(p.batch) * p.chunks;
  workspace.take(p.packed_weight, int64_t(p.rows) * p.padded, size);
  workspace.take(p.origins, slices * p.rows, sizeof(float));
  workspace.take(p.sums, slices * p.rows, sizeof(double));
  workspace.take(p.squares, slices * p.pairs, sizeof(double));
  return workspace.bytes();
}

template <typename T, typename Launch>
void launch_moments(const AffinityMomentsCuda& p, const Launch& launch) {
  launch_pack<T>(p, nullptr, nullptr, launch);
  constexpr int V = VECTOR<T>;
  launch(choose_kernel<T>(p, {p.x}, sum_moments<T, V, true>, sum_moments<T, V, false>, sum_moments<T, 1, true>),
         blocks(p), 1, THREADS, SUM_MOMENTS_SHARED_BYTES<T>, p);
  const int most = *std::max_element(p.sizes, p.sizes + p.num_scales);
  launch(merge_moments, p.batch * p.num_scales, (most * most + THREADS - 1) / THREADS, THREADS, 0, p);
}
