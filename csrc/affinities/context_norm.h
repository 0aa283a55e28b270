// adaptive_context_norm's small tensors on the CPU: its batch norms' statistics and their gradients. What the operators
// (context_norm.cpp) hand to the kernels (guide_norm_cpu.cpp, product_norm_cpu.cpp); phases.py of
// apc_kernels/ops/affinities is the specification.
//
// A unit of work is a part of one scale's channels, or an image at one scale; each sums over images in order, so that
// results are the same bits for any number of threads. What is summed is float64.
#pragma once

#include "affinities.h"

constexpr int64_t PART = 32;  // channels

// S scales of C channels, J regions; the fields of Affinities that describe a map stay empty. Those of the small
// tensors' dtype are void.
struct ContextNorm : Affinities {
  double eps;
  const void *gamma, *beta;  // (S*C)
  double* statistics;        // (2, S*C): mean and variance; those of the guide in the guide's kernels
  double* sums;              // (2, S*C): gradients of a mean and a variance, or of beta and gamma, a mean over images
  void *grad_gamma, *grad_beta;

  const void *pooled, *guide;  // (B, S*C), (S*C, C)
  double *features, *through;  // (B, S*C)
  void* biases;                // (B, J)
  const void *grad_bias, *slope, *slope_moments;
  void *grad_weight, *grad_guide, *constant;  // (J, C), (S*C, C), (B, S*C)

  const void *regions, *projection;  // (B, J, C), (S*C, C)
  const double *mean, *covariance;   // (B, J), (B, pairs)
  double *vectors, *grad_vectors;    // (B, J, C)
  void *norm_rows, *shift, *center;  // (B, J, C), (B, S*C), (B, J)
  const void *grad_rows, *grad_shift;
  void *grad_regions, *grad_projection, *linear, *quadratic;
};

static inline int64_t parts_of(const ContextNorm& p) { return (p.channels + PART - 1) / PART; }

// Scales * parts:
APC_DECLARE_KERNEL(guide_statistics, ContextNorm)
APC_DECLARE_KERNEL(project, ContextNorm)
APC_DECLARE_KERNEL(product_statistics, ContextNorm)
APC_DECLARE_KERNEL(product_norm, ContextNorm)
APC_DECLARE_KERNEL(product_norm_sums, ContextNorm)
APC_DECLARE_KERNEL(vector_gradients, ContextNorm)
APC_DECLARE_KERNEL(region_gradients, ContextNorm)
APC_DECLARE_KERNEL(guide_sums, ContextNorm)
APC_DECLARE_KERNEL(guide_gradients, ContextNorm)
// Images * scales:
APC_DECLARE_KERNEL(guide_biases, ContextNorm)
APC_DECLARE_KERNEL(moment_gradients, ContextNorm)
