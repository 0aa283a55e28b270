// adaptive_context on the CPU: what its operators (adaptive_context.cpp) hand to its kernels
// (adaptive_context_cpu.cpp). The mathematics is that of apc_kernels/ops/adaptive_context/reference.py.
#pragma once

#include "../common/affinities.h"

// Small arrays are contiguous in the accumulator's type; those that are not asked for are null.
struct AdaptiveContext {
  Affinities affinities;
  const void* regions;    // (batch, rows, channels)
  const void* shift;      // (batch, scales * channels)
  const void* center;     // (batch, rows)
  const void* linear;     // (batch, rows)
  const void* quadratic;  // (batch, pairs)
  const void* constant;   // (batch, scales * channels)
  bool residual;
  Map z, grad, grad_x;  // no data: not asked for

  // Sums of each unit, then of all units; the accumulator's type.
  void* unit_matrices;   // (units, channels, padded): gradients of regions (a column of ones: of the shift), of weight
  void* unit_squares;    // (units, regions, padded): slopes times centred affinities, a column of ones
  void* unit_rows;       // (units, regions): gradients of the bias
  int64_t most_regions;  // of a scale: the size that units' arrays have
  void* grad_regions;    // (batch, rows, channels)
  void* grad_shift;      // (batch, scales * channels)
  void* grad_weight;     // (rows, channels)
  void* grad_bias;       // (batch, rows)
  void* slope;           // (batch, rows)
  void* slope_moments;   // (batch, pairs)
};

#define APC_DECLARE(set)                                                           \
  namespace set {                                                                  \
  /* units */                                                                      \
  void aggregate(const AdaptiveContext&, int64_t begin, int64_t end);              \
  void sum_region_gradients(const AdaptiveContext&, int64_t begin, int64_t end);   \
  void write_x_gradients(const AdaptiveContext&, int64_t begin, int64_t end);      \
  /* batch * scales */                                                             \
  void merge_region_gradients(const AdaptiveContext&, int64_t begin, int64_t end); \
  /* scales */                                                                     \
  void merge_weight_gradients(const AdaptiveContext&, int64_t begin, int64_t end); \
  }
APC_FOR_EACH_ISA(APC_DECLARE)
#undef APC_DECLARE
