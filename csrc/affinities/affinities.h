// The operations on affinities on the CPU: what the operators (affinities.cpp) hand to the kernels
// (adaptive_context_cpu.cpp, affinity_moments_cpu.cpp).
//
// An image's positions are worked on in tiles of TILE and shared out in chunks of whole tiles. A unit of work is a
// chunk of an image at one scale. How positions are cut depends on the shape alone, so that sums over positions, which
// are kept for each unit and then added in order, are the same bits for any number of threads.
#pragma once

#include "../common/isa.h"

constexpr int64_t TILE = 96;           // positions: a multiple of three vectors of every instruction set
constexpr int64_t CHANNELS = 32;       // worked on at a time, so that a piece of the map stays in L1
constexpr int64_t SMALL_REGIONS = 64;  // above this many regions a scale's sums are too large to keep several times

static constexpr int64_t padded(int64_t regions) { return (regions + 1 + 15) / 16 * 16; }  // and one column of ones

// Small arrays are contiguous in the accumulator's type; those that are not asked for are null.
struct Affinities {
  Scalar scalar;
  int64_t batch, channels;  // of one scale
  int64_t positions;
  int num_scales;
  const int64_t* scales;
  int64_t rows, pairs;   // sums of s*s and of s^4
  int64_t most_regions;  // of a scale
  int64_t chunks;        // of an image
  Map x;                 // columns or channels side by side
  const void* weight;    // (rows, channels)
  const void* bias;      // (batch, rows)
};

struct AdaptiveContext : Affinities {
  const void* regions;           // (batch, rows, channels)
  const void *center, *linear;   // (batch, rows)
  const void* quadratic;         // (batch, pairs)
  const void *shift, *constant;  // (batch, scales * channels)
  bool residual;
  Map z, grad, grad_x;  // no data: not asked for

  // Sums of each unit, the arrays as large as the largest scale's; then of all units.
  void* unit_matrices;  // (units, channels, padded): gradients of regions (a column of ones: of the shift), of weight
  void* unit_squares;   // (units, regions, padded): slopes times centred affinities, a column of ones
  void* unit_rows;      // (units, regions): gradients of the bias
  void* grad_regions;   // (batch, rows, channels)
  void* grad_shift;     // (batch, scales * channels)
  void* grad_weight;    // (rows, channels)
  void *grad_bias, *slope;  // (batch, rows)
  void* slope_moments;      // (batch, pairs)
};

struct AffinityMoments : Affinities {
  double* sums;  // each unit's: the affinities it subtracts (regions), then sums (regions x padded), a column of ones
  int64_t unit_sums;   // doubles for each unit of the largest scale
  double* mean;        // (batch, rows)
  double* covariance;  // (batch, pairs)
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

// Units:
APC_DECLARE_KERNEL(aggregate, AdaptiveContext)
APC_DECLARE_KERNEL(sum_region_gradients, AdaptiveContext)
APC_DECLARE_KERNEL(write_x_gradients, AdaptiveContext)
APC_DECLARE_KERNEL(sum_moments, AffinityMoments)
// batch * scales:
APC_DECLARE_KERNEL(merge_region_gradients, AdaptiveContext)
APC_DECLARE_KERNEL(merge_moments, AffinityMoments)
// scales:
APC_DECLARE_KERNEL(merge_weight_gradients, AdaptiveContext)
