// encode on the CPU: what the operators (encode.cpp) hand to the kernels (encode_cpu.cpp).
//
// A unit of work is up to CHUNK positions of an image. It leaves its share of every sum over positions, and the shares
// of an image are added up in order: results are the same bits for any number of threads.
#pragma once

#include "../common/isa.h"

constexpr int64_t CHUNK = 1024;  // positions of a unit

struct Encode {
  Scalar scalar;  // of x; all other tensors are float32, or float64 beside it
  int64_t batch, channels, positions, words;
  const void* x;  // (B, C, N): its positions or its channels lie side by side
  int64_t x_b, x_c, x_n;
  const void *codewords, *center, *scale;  // (K, C), (C), (K); the center is the mean codeword
  void *distances, *weights;               // (B, K, N)
  void* encoded;                           // (B, C, K)
  void* sums;                              // (units, C, padded K): of weights or of the distances' gradients · features
  double* counts;                          // (units, 3, K): sums of both, and the gradient of scale
  const void* grad;                        // (B, K, C)
  void* grad_x;                            // as x
  int64_t grad_b, grad_c, grad_n;
  void *grad_words, *grad_scale;  // (K, C), (K)
};

static inline int64_t chunks_of(const Encode& p) { return (p.positions + CHUNK - 1) / CHUNK; }

// Images * chunks of positions:
APC_DECLARE_KERNEL(encode_chunks, Encode)
APC_DECLARE_KERNEL(encode_chunk_gradients, Encode)
// Channels:
APC_DECLARE_KERNEL(encode_sums, Encode)
APC_DECLARE_KERNEL(encode_sum_gradients, Encode)
