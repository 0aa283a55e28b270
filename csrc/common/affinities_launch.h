// What launching the CUDA kernels on affinities takes: maps and scales described, positions cut, workspaces laid out.
// Torch-free, as every *_launch.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "affinities.cuh"

// sizes and strides of a map: batch, channels, height, width. Positions that follow each other with one stride become
// one row, so that vectors may run across the ends of the map's rows.
inline MapCuda describe_map_cuda(const int64_t* sizes, const int64_t* strides, void* data) {
  MapCuda map{data, strides[0], strides[1], strides[2], strides[3], int(sizes[3]), false};
  if (sizes[3] == 1) map.stride_x = strides[2], map.width = int(sizes[2]);
  if (sizes[2] == 1 || strides[2] == sizes[3] * strides[3]) map.width = int(sizes[2] * sizes[3]);
  map.by_channel = map.stride_c == 1 && map.stride_x != 1;
  return map;
}

// How many blocks keep a large GPU busy: where sums over positions are kept, more would only make more slices.
constexpr int CHUNKED_BLOCKS = 1024;

// target_blocks: chunks of positions are as long as leaves that many blocks; 0 for chunks of one tile.
template <typename Params>
Params describe_affinities_cuda(const int64_t* sizes, const int64_t* strides, const std::vector<int64_t>& scales,
                                void* x, const float* weight, const float* bias, int target_blocks) {
  constexpr int MAX_CHUNK_TILES = 8;
  Params p{};
  if (scales.empty() || scales.size() > MAX_SCALES || sizes[2] * sizes[3] >= (1 << 30))
    throw std::runtime_error("the CUDA kernels take up to 16 scales and 2^30 positions");
  p.batch = int(sizes[0]), p.channels = int(sizes[1]) / int(scales.size()), p.positions = int(sizes[2] * sizes[3]);
  for (int64_t s : scales) {
    if (s < 1 || s * s > MAX_REGIONS) throw std::runtime_error("the CUDA kernels take scales of up to 8");
    p.sizes[p.num_scales++] = int(s * s);
    p.rows += int(s * s), p.pairs += int(s * s * s * s);
  }
  p.padded = (p.channels + PADDED - 1) / PADDED * PADDED;
  p.tiles = (p.positions + TILE - 1) / TILE;
  const int64_t blocks = sizes[0] * p.num_scales * p.tiles;
  p.chunk_tiles = target_blocks == 0 ? 1 : int(std::clamp<int64_t>(blocks / target_blocks, 1, MAX_CHUNK_TILES));
  p.chunks = (p.tiles + p.chunk_tiles - 1) / p.chunk_tiles;
  if (sizes[1] > (1 << 30) || blocks > INT32_MAX || sizes[0] * p.rows > INT32_MAX / 2)
    throw std::runtime_error("the map has too many images or channels for the CUDA kernels' grids");
  p.x = describe_map_cuda(sizes, strides, x);
  p.weight = weight, p.bias = bias;
  return p;
}

inline int blocks(const AffinitiesCuda& p) { return p.batch * p.num_scales * p.chunks; }

// Whether every vector of V lies in one pixel's channels of a scale (or in one row's positions) and starts at a
// multiple of its size.
template <typename T, int V>
bool vectorises(const AffinitiesCuda& p, const MapCuda& map, bool along_channels) {
  const bool whole = along_channels ? map.stride_c == 1 && p.channels % V == 0 && map.stride_x % V == 0
                                    : map.stride_x == 1 && map.width % V == 0 && map.stride_c % V == 0;
  return whole && map.stride_b % V == 0 && (map.width == p.positions || map.stride_y % V == 0) &&
         reinterpret_cast<uintptr_t>(map.data) % (V * sizeof(T)) == 0;
}

// The kernel for the layout that all maps have in common.
template <typename T, typename Kernel>
Kernel choose_kernel(const AffinitiesCuda& p, std::initializer_list<MapCuda> maps, Kernel along_channels,
                     Kernel along_positions, Kernel any) {
  const auto all = [&](bool by_channel) {
    return std::all_of(maps.begin(), maps.end(), [&](const MapCuda& map) {
      return map.data == nullptr || vectorises<T, VECTOR<T>>(p, map, by_channel);
    });
  };
  return all(true) ? along_channels : all(false) ? along_positions : any;
}

// Hands out a workspace piece by piece. Without memory it only counts, and the pieces mean nothing.
class Workspace {
 public:
  explicit Workspace(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)) {}
  template <typename T>
  void take(T*& piece, int64_t count, size_t size) {
    piece = reinterpret_cast<T*>(begin_ + bytes_);
    bytes_ += (uintptr_t(count) * size + 255) / 256 * 256;
  }
  int64_t bytes() const { return int64_t(bytes_); }

 private:
  uintptr_t begin_, bytes_ = 0;
};

// Rounds weight, and regions if there are any, to the map's type.
template <typename T, typename Launch>
void launch_pack(const AffinitiesCuda& p, const float* regions, void* packed_regions, const Launch& launch) {
  const int rows = regions == nullptr ? 0 : p.batch * p.rows;
  const PackCuda pack{{p.weight, regions}, {p.packed_weight, packed_regions}, {p.rows, rows}, p.channels, p.padded};
  launch(pack_rows<T>, p.rows + rows, 1, THREADS, 0, pack);
}
