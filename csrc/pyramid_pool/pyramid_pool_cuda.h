// What pyramid_pool's CUDA kernels are told, and what launches them: the link between the operators
// (pyramid_pool_cuda.cpp) and the kernels (pyramid_pool.cu).
#pragma once

#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "segments.h"

// Limits that apc_kernels/ops/pyramid_pool knows too: beyond them the reference serves. They keep every product below
// in 32 bits and the segments of an axis (two edges a bin) in the table.
constexpr int MAX_EXTENT = 8192, MAX_COLUMNS = 512, MAX_SEGMENTS = 2 * MAX_COLUMNS;
constexpr int TILE_X = 64, TILE_C = 64, TILE_BINS = 16, TILE_REGIONS = 64, THREADS = 256;
constexpr int VECTOR = 4;  // numbers in 16 bytes of sums

// Passed by value: it must stay below the 4 KB that every architecture allows kernel parameters.
struct PyramidPoolCuda {
  int batch, channels, height, width;
  int64_t stride_b, stride_c, stride_y, stride_x;  // of the map, in elements
  bool by_channel;                                 // channels lie side by side
  int padded;                                      // channels of a row of row_sums
  int num_scales, columns, regions;                // Σs and Σs²
  int segments, chunks;                            // of the rows; of the columns, TILE_X each
  int scales[MAX_SCALES];
  uint16_t cuts[MAX_SEGMENTS + 1];  // segment e covers the rows [cuts[e], cuts[e + 1])
  void* map;                        // (batch, channels, height, width): x, or its gradient
  void* pooled;                     // (batch, channels, regions): the result, or its gradient
  float* row_sums;                  // (batch, segments, chunks, columns, padded)
};
static_assert(sizeof(PyramidPoolCuda) < 4096);

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
  p.by_channel = p.width == 1 ? p.stride_c == 1 : p.stride_x != 1;
  for (size_t i = 0; i < cuts.size(); ++i) p.cuts[i] = static_cast<uint16_t>(cuts[i]);
  p.map = map, p.pooled = pooled;
  return p;
}

enum class MapType;
struct Launcher;
void launch_forward(const PyramidPoolCuda& p, MapType type, const Launcher& launch);
void launch_backward(const PyramidPoolCuda& p, MapType type, const Launcher& launch);
