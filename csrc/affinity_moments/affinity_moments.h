// affinity_moments on the CPU: what its operator (affinity_moments.cpp) hands to its kernels
// (affinity_moments_cpu.cpp).
#pragma once

#include "../common/affinities.h"

struct AffinityMoments {
  Affinities affinities;
  double* sums;  // each unit's: the affinities it subtracts (regions), then sums (regions x padded), a column of ones
  int64_t unit_sums;   // doubles for each unit of the largest scale
  double* mean;        // (batch, rows)
  double* covariance;  // (batch, pairs)
};

#define APC_DECLARE(set)                                                                       \
  namespace set {                                                                              \
  void sum_moments(const AffinityMoments&, int64_t begin, int64_t end);   /* units */          \
  void merge_moments(const AffinityMoments&, int64_t begin, int64_t end); /* batch * scales */ \
  }
APC_FOR_EACH_ISA(APC_DECLARE)
#undef APC_DECLARE
