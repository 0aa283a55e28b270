// Which CUDA kernels affinity_moments runs, over which grids.
#pragma once

#include "affinities_launch.h"
#include "affinity_moments_mma.cuh"

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
  const double whole = p.chunk_tiles * TILE, last = p.positions - (p.chunks - 1) * whole;
  const MergeMomentsCuda merge{{p}, whole, last, 1 / whole, 1 / last, 1.0 / p.positions};
  int stretches = 0;
  for (int k = 0; k < p.num_scales; ++k) stretches += stretches_of_pairs(p.sizes[k]);
  launch(merge_moments, p.batch, stretches, MERGE_THREADS, MERGE_MOMENTS_SHARED_BYTES, merge);
}
