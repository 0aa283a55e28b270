// The work of a block of the CUDA kernels on affinities: one scale of one image, tiles of its positions. tiles.cuh has
// the products of float32 maps, fragments.cuh those of bfloat16 and float16 ones.
#pragma once

#include "../common/device.cuh"
#include "affinities_cuda.h"

// What blockIdx.x counts: images, scales, chunks of positions.
struct Work {
  int b, scale, chunk, regions, first_row, first_pair, first_fragment_row;
};

static __device__ __forceinline__ Work locate_work(const AffinitiesCuda& p) {
  const int block = static_cast<int>(blockIdx.x);
  Work work{block / (p.chunks * p.num_scales), block / p.chunks % p.num_scales, block % p.chunks, 0, 0, 0, 0};
  for (int k = 0; k < work.scale; ++k) {
    work.first_row += p.sizes[k], work.first_pair += p.sizes[k] * p.sizes[k];
    work.first_fragment_row += fragment_rows(p.sizes[k]);
  }
  work.regions = p.sizes[work.scale];
  return work;
}

// The positions of a tile.
struct Tile {
  int first, count;
  bool first_of_chunk;
};
