// Which CUDA kernels pyramid_pool runs, over which grids. Torch-free: `launch(kernel, grid_x, grid_y, threads,
// shared_bytes, params)` starts them on a GPU (pyramid_pool.cu) or on the emulation (tests/emulation).
#pragma once

#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>

#include "pyramid_pool.cuh"
#include "segments.h"

// sizes and strides of the map: batch, channels, height, width.
inline PyramidPoolCuda describe_pyramid_pool(const int64_t* sizes, const int64_t* strides,
                                             const std::vector<int64_t>& scales, void* map, void* pooled) {
  const int64_t columns = std::accumulate(scales.begin(), scales.end(), int64_t(0));
  if (scales.size() > MAX_SCALES || columns > MAX_COLUMNS || sizes[2] > MAX_EXTENT || sizes[3] > MAX_EXTENT)
    throw std::runtime_error("the CUDA kernels take maps of up to " + std::to_string(MAX_EXTENT) +
                             " rows and columns and up to " + std::to_string(MAX_SCALES) + " scales adding up to " +
                             std::to_string(MAX_COLUMNS));
  PyramidPoolCuda p{};
  p.columns = int(columns);
  for (int64_t s : scales) p.scales[p.num_scales++] = int(s), p.regions += int(s * s);
  const std::vector<int> cuts = Segments(sizes[2], scales).cuts();
  p.segments = int(cuts.size()) - 1, p.chunks = (int(sizes[3]) + TILE_X - 1) / TILE_X;
  if (sizes[0] * p.segments * p.chunks > INT32_MAX || sizes[0] * sizes[1] > INT32_MAX ||
      sizes[1] > TILE_C * int64_t(65535))
    throw std::runtime_error("the map has too many images or channels for the CUDA kernels' grids");
  p.batch = int(sizes[0]), p.channels = int(sizes[1]), p.height = int(sizes[2]), p.width = int(sizes[3]);
  p.padded = (p.channels + VECTOR - 1) / VECTOR * VECTOR;
  p.stride_b = strides[0], p.stride_c = strides[1], p.stride_y = strides[2], p.stride_x = strides[3];
  for (size_t i = 0; i < cuts.size(); ++i) p.cuts[i] = static_cast<uint16_t>(cuts[i]);
  p.map = map, p.pooled = pooled;
  return p;
}

inline bool by_channel(const PyramidPoolCuda& p) { return p.width == 1 ? p.stride_c == 1 : p.stride_x != 1; }

// Whether every vector of V lies inside a row (or a pixel's channels) and starts at a multiple of its size.
template <typename T, int V>
bool vectorises(const PyramidPoolCuda& p) {
  const bool whole = by_channel(p) ? p.stride_c == 1 && p.channels % V == 0 && p.stride_x % V == 0
                                   : p.stride_x == 1 && p.width % V == 0 && p.stride_c % V == 0;
  return whole && p.stride_b % V == 0 && p.stride_y % V == 0 &&
         reinterpret_cast<uintptr_t>(p.map) % (V * sizeof(T)) == 0;
}

template <typename T, typename Launch>
void launch_forward(const PyramidPoolCuda& p, const Launch& launch) {
  constexpr int V = 16 / sizeof(T);
  const auto kernel = vectorises<T, V>(p) ? (by_channel(p) ? pool_rows<T, V, true> : pool_rows<T, V, false>)
                                          : (by_channel(p) ? pool_rows<T, 1, true> : pool_rows<T, 1, false>);
  launch(kernel, p.batch * p.segments * p.chunks, (p.channels + TILE_C - 1) / TILE_C, THREADS,
         pool_rows_shared_bytes(p.columns), p);
  launch(pool_bins<T>, p.batch * ((p.channels + POOL_BINS_CHANNELS - 1) / POOL_BINS_CHANNELS),
         (p.regions + TILE_REGIONS - 1) / TILE_REGIONS, THREADS, POOL_BINS_SHARED_BYTES, p);
}

template <typename T, typename Launch>
void launch_backward(const PyramidPoolCuda& p, const Launch& launch) {
  constexpr int V = 16 / sizeof(T);
  const auto kernel = vectorises<T, V>(p) ? (by_channel(p) ? spread_rows<T, V, true> : spread_rows<T, V, false>)
                                          : (by_channel(p) ? spread_rows<T, 1, true> : spread_rows<T, 1, false>);
  launch(kernel, p.batch * p.segments * p.chunks, (p.channels + TILE_C - 1) / TILE_C, THREADS, Spread::bytes(p.columns),
         p);
}
