// What the CUDA kernels on affinities are told: maps and scales described, positions cut, workspaces laid out. And what
// launches them: the link between the operators (affinities_cuda.cpp) and the kernels (the *.cu files here).
// Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

// Limits that apc_kernels/ops/affinities knows too; the last of regions beside low-precision maps.
constexpr int MAX_SCALES = 16, MAX_REGIONS = 64, MAX_FRAGMENT_REGIONS = 36;
constexpr int THREADS = 256, TILE = 64;
constexpr int CHUNK = 32;   // channels of float32 maps in shared memory at a time
constexpr int PADDED = 64;  // rows of small matrices lie at multiples of so many numbers in global memory

// A map (batch, scales * channels, positions) in global memory; strides in elements.
struct MapCuda {
  void* data;  // null where it is not given
  int64_t stride_b, stride_c, stride_y, stride_x;
  int width;  // position n lies at n / width, n % width
  bool by_channel;
};

// The part of a kernel's parameters that all operations on affinities have. Chunks and sums depend on the shape alone.
struct AffinitiesCuda {
  int batch, channels, positions;  // channels: of one scale
  int num_scales, rows, pairs;     // Σs² and Σs⁴
  int padded;                      // channels of a row in packed small matrices
  int tiles, chunk_tiles, chunks;  // of an image; of a chunk; of an image
  int sizes[MAX_SCALES];           // s², the regions of a scale
  MapCuda x;
  const float* weight;  // (rows, channels)
  const float* bias;    // (batch, rows)
  void* packed_weight;  // (rows, padded) in the map's type; beside low-precision maps in fragments.cuh's order
  int fragment_rows;    // of an image there
  bool vectors;         // whether all maps move in vectors along channels there
  void* weight_pairs;
};

// Rows of a scale's packed matrices beside low-precision maps. One at least is beyond the regions: sums over positions
// count there.
constexpr int fragment_rows(int regions) { return regions < 16 ? 16 : 48; }
static_assert(fragment_rows(MAX_FRAGMENT_REGIONS) > MAX_FRAGMENT_REGIONS);

// Passed by value: it must stay below the 4 KB that every architecture allows kernel parameters.
struct AdaptiveContextCuda : AffinitiesCuda {
  const float* regions;  // (batch, rows, channels); null where grad is
  const float* shift;    // (batch, scales * channels), may be null
  const float* center;   // (batch, rows), may be null
  bool residual;
  void* packed_regions;  // (batch, rows, padded) in the map's type; beside low-precision maps as packed_weight
  void* region_pairs;
  float *padded_shift, *padded_constant;  // (batch * scales, padded), beside low-precision maps
  MapCuda z, grad, grad_x;
  float *grad_regions, *grad_shift, *grad_bias, *slope, *slope_moments;  // the results
  const float *linear, *quadratic, *constant;  // (batch, rows), (batch, pairs), (batch, scales * channels), may be null
  float* grad_weight;                          // (rows, channels)
  // Slices, (batch, chunks, ...): the gradient of regions or weight (rows, padded), that of shift (THREADS / CHUNK,
  // scales * channels), sums over rows of a tile (ROW_PARTS, rows) twice, (pairs).
  float *matrix_slices, *shift_slices, *bias_slices, *slope_slices, *pair_slices;
};
static_assert(sizeof(AdaptiveContextCuda) < 4096);

// Parts of a tile's positions that different threads sum up.
constexpr int ROW_PARTS = THREADS / MAX_REGIONS;
constexpr int SHIFT_PARTS = THREADS / CHUNK;

struct AffinityMomentsCuda : AffinitiesCuda {
  double *mean, *covariance;  // (batch, rows) and (batch, pairs)
  float* origins;             // (batch, chunks, rows)
  double *sums, *squares;     // (batch, chunks, rows) and (batch, chunks, pairs)
};
static_assert(sizeof(AffinityMomentsCuda) < 4096);

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

// size: of the map's numbers, in bytes. target_blocks: chunks of positions are as long as leaves that many blocks; 0
// for chunks of one tile.
inline void describe_affinities_cuda(AffinitiesCuda& p, const int64_t* sizes, const int64_t* strides,
                                     const std::vector<int64_t>& scales, void* x, size_t size, int target_blocks) {
  constexpr int MAX_CHUNK_TILES = 8;
  if (scales.empty() || scales.size() > MAX_SCALES || sizes[2] * sizes[3] >= (1 << 30))
    throw std::runtime_error("the CUDA kernels take up to 16 scales and 2^30 positions");
  p.batch = int(sizes[0]), p.channels = int(sizes[1]) / int(scales.size()), p.positions = int(sizes[2] * sizes[3]);
  for (int64_t s : scales) {
    if (s < 1 || s * s > (size == 2 ? MAX_FRAGMENT_REGIONS : MAX_REGIONS))
      throw std::runtime_error("the CUDA kernels take scales of up to 8, beside bfloat16 and float16 maps up to 6");
    p.sizes[p.num_scales++] = int(s * s);
    p.rows += int(s * s), p.pairs += int(s * s * s * s), p.fragment_rows += fragment_rows(int(s * s));
  }
  p.padded = (p.channels + PADDED - 1) / PADDED * PADDED;
  p.tiles = (p.positions + TILE - 1) / TILE;
  const int64_t blocks = sizes[0] * p.num_scales * p.tiles;
  p.chunk_tiles = target_blocks == 0 ? 1 : int(std::clamp<int64_t>(blocks / target_blocks, 1, MAX_CHUNK_TILES));
  p.chunks = (p.tiles + p.chunk_tiles - 1) / p.chunk_tiles;
  if (sizes[1] > (1 << 30) || blocks > INT32_MAX || sizes[0] * p.rows > INT32_MAX / 2)
    throw std::runtime_error("the map has too many images or channels for the CUDA kernels' grids");
  p.x = describe_map_cuda(sizes, strides, x);
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

// Lays the workspace out, or counts its bytes where memory is null. size: of the map's scalars.
inline int64_t arrange(AdaptiveContextCuda& p, void* memory, size_t size) {
  Workspace workspace(memory);
  const int64_t slices = int64_t(p.batch) * p.chunks, channels = int64_t(p.num_scales) * p.channels;
  if (size == 2) {
    const int64_t rows = p.fragment_rows, regions = p.regions == nullptr ? 0 : p.batch * rows;
    workspace.take(p.packed_weight, rows * p.padded, size);
    workspace.take(p.weight_pairs, rows * p.padded, size);
    workspace.take(p.packed_regions, regions * p.padded, size);
    workspace.take(p.region_pairs, regions * p.padded, size);
    if (p.shift != nullptr) workspace.take(p.padded_shift, int64_t(p.batch) * p.num_scales * p.padded, sizeof(float));
    if (p.constant != nullptr)
      workspace.take(p.padded_constant, int64_t(p.batch) * p.num_scales * p.padded, sizeof(float));
  } else {
    workspace.take(p.packed_weight, int64_t(p.rows) * p.padded, size);
    if (p.regions != nullptr) workspace.take(p.packed_regions, int64_t(p.batch) * p.rows * p.padded, size);
  }
  if (p.grad_bias != nullptr) {
    workspace.take(p.matrix_slices, slices * p.rows * p.padded, sizeof(float));
    workspace.take(p.bias_slices, slices * ROW_PARTS * p.rows, sizeof(float));
  }
  if (p.grad_regions != nullptr) {
    const int64_t shifts = size == 2 ? int64_t(p.num_scales) * p.padded : SHIFT_PARTS * channels;
    workspace.take(p.shift_slices, slices * shifts, sizeof(float));
    workspace.take(p.slope_slices, slices * ROW_PARTS * p.rows, sizeof(float));
    workspace.take(p.pair_slices, slices * p.pairs, sizeof(float));
  }
  return workspace.bytes();
}

inline int64_t arrange(AffinityMomentsCuda& p, void* memory, size_t size) {
  Workspace workspace(memory);
  const int64_t slices = int64_t(p.batch) * p.chunks, rows = size == 2 ? p.fragment_rows : p.rows;
  workspace.take(p.packed_weight, rows * p.padded, size);
  if (size == 2) workspace.take(p.weight_pairs, rows * p.padded, size);
  workspace.take(p.origins, slices * p.rows, sizeof(float));
  workspace.take(p.sums, slices * p.rows, sizeof(double));
  workspace.take(p.squares, slices * p.pairs, sizeof(double));
  return workspace.bytes();
}

enum class MapType;
struct Launcher;
void launch_aggregate(const AdaptiveContextCuda& p, MapType type, const Launcher& launch);
void launch_region_gradients(const AdaptiveContextCuda& p, MapType type, const Launcher& launch);
void launch_x_gradients(const AdaptiveContextCuda& p, MapType type, const Launcher& launch);
void launch_moments(const AffinityMomentsCuda& p, MapType type, const Launcher& launch);
