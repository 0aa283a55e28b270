// upsample_* on the CPU: what the operators (upsample.cpp) hand to the kernels (upsample_*_cpu.cpp).
//
// Output rows between the same two source rows form a group; a unit of forward work is one group of one image. Both
// source rows are interpolated horizontally once for a group, class by class, in vectors along the row; an output row
// then costs a product and a sum for each vector and class, and what is made of it stays in registers.
#pragma once

#include <cstdint>

#include "../common/interpolation.h"
#include "../common/isa.h"
#include "../common/scalar.h"

enum class LabelType { uint8, int16, int32, int64 };

struct Logits {
  void* data;
  int64_t stride_b, stride_k, stride_y, stride_x;
};

struct Upsample {
  Scalar scalar;
  int64_t batch, classes;
  Axis rows, columns;
  Logits logits;
};

struct Labels {
  LabelType type;
  void* data;  // (batch, rows.size, columns.size), contiguous
};

struct CrossEntropy {
  Upsample upsample;
  Labels target;
  const void* weight;  // (classes), or nullptr
  int64_t ignore_index;
  double label_smoothing;
  void* normalizer;  // (batch, rows.size, columns.size): the sum of exp(logit - largest logit)
  void* losses;      // the same shape, or nullptr
  double* sums;      // (units, 4): losses, weights, correct pixels, labels out of range
  // Backward only.
  const void* grad;  // of the losses: one number, or one for each pixel
  bool grad_is_scalar;
  Logits grad_logits;
  int64_t bands;  // of source rows, into which an image is cut
};

struct Argmax {
  Upsample upsample;
  Labels labels;
};

struct Confusion {
  Upsample upsample;
  Labels target;
  int64_t ignore_index;
  int64_t* counts;  // (classes, classes); added to atomically
  int64_t* invalid;
};

struct Softmax {
  Upsample upsample;
  bool flip, add;
  Logits out;
};

#define APC_DECLARE(set)                                                              \
  namespace set {                                                                     \
  /* units [begin, end) of batch * rows.source */                                     \
  void cross_entropy_groups(const CrossEntropy&, int64_t begin, int64_t end);         \
  void argmax_groups(const Argmax&, int64_t begin, int64_t end);                      \
  void confusion_groups(const Confusion&, int64_t begin, int64_t end);                \
  void softmax_groups(const Softmax&, int64_t begin, int64_t end);                    \
  /* units [begin, end) of batch * bands */                                           \
  void cross_entropy_backward_bands(const CrossEntropy&, int64_t begin, int64_t end); \
  }
APC_FOR_EACH_ISA(APC_DECLARE)
#undef APC_DECLARE
