// The parameters that all CUDA kernels on affinities have, and the work of a block: one scale of one image, tiles of
// its positions. tiles.cuh has the products of float32 maps, fragments.cuh those of bfloat16 and float16 ones.
#pragma once

#include "../common/device.cuh"

constexpr int MAX_SCALES = 16, MAX_REGIONS = 64;  // as apc_kernels/ops/affinities knows
constexpr int THREADS = 256, TILE = 64;
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
  bool wide;
  void* weight_pairs;
};

// Rows of a scale's packed matrices beside low-precision maps. One at least is beyond the regions: sums over positions
// count there. `wide` calls have a scale of 7 or 8, and as many rows for each.
constexpr int WIDE = 48;
static inline __device__ constexpr int fragment_rows(int regions, bool wide) {
  return wide ? 80 : regions < 16 ? 16 : WIDE;
}
static_assert(fragment_rows(MAX_REGIONS, true) > MAX_REGIONS);

// What blockIdx.x counts: images, scales, chunks of positions.
struct Work {
  int b, scale, chunk, regions, first_row, first_pair, first_fragment_row;
};

static __device__ __forceinline__ Work locate_work(const AffinitiesCuda& p) {
  const int block = static_cast<int>(blockIdx.x);
  Work work{block / (p.chunks * p.num_scales), block / p.chunks % p.num_scales, block % p.chunks, 0, 0, 0, 0};
  for (int k = 0; k < work.scale; ++k) {
    work.first_row += p.sizes[k], work.first_pair += p.sizes[k] * p.sizes[k];
    work.first_fragment_row += fragment_rows(p.sizes[k], p.wide);
  }
  work.regions = p.sizes[work.scale];
  return work;
}

// The positions of a tile.
struct Tile {
  int first, count;
  bool first_of_chunk;
};
