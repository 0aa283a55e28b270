// Which CUDA kernels pyramid_pool runs, over which grids. Torch-free: `launch(kernel, grid_x, grid_y, threads,
// shared_bytes, params)` starts them on a GPU (pyramid_pool.cu) or on the emulation (tests/emulation).
#pragma once

#include "pyramid_pool.cuh"

// Whether every vector of V lies inside a row (or a pixel's channels) and starts at a multiple of its size.
template <typename T, int V>
bool vectorises(const PyramidPoolCuda& p) {
  const bool whole = p.by_channel ? p.stride_c == 1 && p.channels % V == 0 && p.stride_x % V == 0
                                  : p.stride_x == 1 && p.width % V == 0 && p.stride_c % V == 0;
  return whole && p.stride_b % V == 0 && p.stride_y % V == 0 &&
         reinterpret_cast<uintptr_t>(p.map) % (V * sizeof(T)) == 0;
}

template <typename T, typename Launch>
void launch_forward(const PyramidPoolCuda& p, const Launch& launch) {
  constexpr int V = 16 / sizeof(T);
  const auto kernel = !vectorises<T, V>(p) ? pool_rows<T, 1, false>
                      : p.by_channel       ? pool_rows<T, V, true>
                                           : pool_rows<T, V, false>;
  launch(kernel, p.batch * p.segments * p.chunks, (p.channels + TILE_C - 1) / TILE_C, THREADS,
         pool_rows_shared_bytes(p.columns), p);
  launch(pool_bins<T>, p.batch * ((p.channels + POOL_BINS_CHANNELS - 1) / POOL_BINS_CHANNELS),
         (p.regions + TILE_REGIONS - 1) / TILE_REGIONS, THREADS, POOL_BINS_SHARED_BYTES, p);
}

template <typename T, typename Launch>
void launch_backward(const PyramidPoolCuda& p, const Launch& launch) {
  constexpr int V = 16 / sizeof(T);
  const auto kernel = !vectorises<T, V>(p) ? spread_rows<T, 1, false>
                      : p.by_channel       ? spread_rows<T, V, true>
                                           : spread_rows<T, V, false>;
  launch(kernel, p.batch * p.segments * p.chunks, (p.channels + TILE_C - 1) / TILE_C, THREADS, Spread::bytes(p.columns),
         p);
}
