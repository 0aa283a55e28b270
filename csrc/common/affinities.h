// What the operations on affinities share on the CPU: the description of a map, its scales, and how positions are cut.
//
// An image's positions are worked on in tiles of TILE and shared out in chunks of whole tiles. A unit of work is a
// chunk of an image at one scale. How positions are cut depends on the shape alone, so that sums over positions, which
// are kept for each unit and then added in order, are the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "isa.h"
#include "scalar.h"

constexpr int64_t TILE = 96;           // positions: a multiple of three vectors of every instruction set
constexpr int64_t CHANNELS = 32;       // worked on at a time, so that a piece of the map stays in L1
constexpr int64_t SMALL_REGIONS = 64;  // above this many regions a scale's sums are too large to keep several times

static constexpr int64_t padded(int64_t regions) { return (regions + 1 + 15) / 16 * 16; }  // and one column of ones

// A map (batch, channels, height, width) with columns or channels side by side; strides in elements.
struct Map {
  void* data;
  int64_t stride_b, stride_c, stride_y, stride_x, height, width;
};

struct Affinities {
  Scalar scalar;
  int64_t batch, channels;  // of one scale
  int64_t positions;
  int num_scales;
  const int64_t* scales;
  int64_t rows, pairs;  // sums of s*s and of s^4
  int64_t chunks;       // of an image
  Map x;
  const void* weight;  // (rows, channels)
  const void* bias;    // (batch, rows)
};

// One scale's place in everything.
struct ScaleBlock {
  int64_t regions, first_row, first_pair, first_channel;
};

static inline ScaleBlock scale_block(const Affinities& p, int64_t scale) {
  ScaleBlock block{p.scales[scale] * p.scales[scale], 0, 0, scale * p.channels};
  for (int64_t i = 0; i < scale; ++i) {
    const int64_t regions = p.scales[i] * p.scales[i];
    block.first_row += regions;
    block.first_pair += regions * regions;
  }
  return block;
}
