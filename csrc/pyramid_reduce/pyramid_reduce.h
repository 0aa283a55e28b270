// pyramid_reduce on the CPU: what the operators (pyramid_reduce.cpp) hand to the kernels (pyramid_reduce_cpu.cpp).
//
// A unit of work is some output channels of one scale: their products with the regions of all images, which a batch
// norm needs together, then its statistics and results. Backward goes the same way in reverse.
#pragma once

#include "../common/isa.h"
#include "../common/pyramid.h"

// A scale's convolution and batch norm, and the gradients of their tensors.
struct Reduction {
  const void *weight, *gamma, *beta;  // (O, C), (O), (O)
  void *running_mean, *running_var;   // (O)
  double eps, momentum;
  void *grad_weight, *grad_gamma, *grad_beta;
};

struct PyramidReduce : Pyramid {
  int64_t outputs;
  const Reduction* reductions;  // one for each scale
  bool training;                // normalises by the statistics of this batch
  void* products;               // for each scale (O, columns); backward: then their gradients
  double* statistics;           // (2, S, O): mean, and 1 / the standard deviation
  void* result;                 // (B, O, J)
  const void* grad;             // (B, O, J)
  void* gradients;              // of the products
  void* grad_regions;           // (B, C, J)
};

constexpr int64_t OUTPUTS = 28;  // of a unit: the regions are read from the cache once for all of them

static inline int64_t output_blocks(const PyramidReduce& p) { return (p.outputs + OUTPUTS - 1) / OUTPUTS; }

// Scales * blocks of channels:
APC_DECLARE_KERNEL(pyramid_reduce_pack, PyramidReduce)
APC_DECLARE_KERNEL(pyramid_reduce_region_gradients, PyramidReduce)
// Scales * blocks of output channels:
APC_DECLARE_KERNEL(pyramid_reduce, PyramidReduce)
APC_DECLARE_KERNEL(pyramid_reduce_gradients, PyramidReduce)
