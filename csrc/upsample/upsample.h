// upsample_* on the CPU: what the operators (upsample.cpp) hand to the kernels (upsample_*_cpu.cpp).
//
// Output rows between the same two source rows form a group; a unit of forward work is one group of one image. Both
// source rows are interpolated horizontally once for a group, class by class, in vectors along the row; an output row
// then costs a product and a sum for each vector and class, and what is made of it stays in registers.
#pragma once

#include "../common/interpolation.h"
#include "../common/isa.h"

enum class LabelType { uint8, int16, int32, int64 };

struct Upsample {
  Scalar scalar;
  int64_t batch, classes;
  Axis rows, columns;
  Map logits;
};

struct Labels {
  LabelType type;
  void* data;  // (batch, rows.size, columns.size), contiguous
};

// What the losses of pixels are: the forms that kernels are compiled for.
enum class Form { plain, smooth, focal };

struct CrossEntropy : Upsample {
  Labels target;
  const void* weight = nullptr;  // (classes), or nullptr
  int64_t ignore_index = 0;
  double label_smoothing = 0;  // 0 with focal
  double focal = 0;            // the exponent gamma of focal loss
  void* normalizer = nullptr;  // (batch, rows.size, columns.size): the sum of exp(logit - largest logit), with focal
                               // over all classes but the label
  void* losses = nullptr;      // the same shape, or nullptr
  double* sums = nullptr;      // (units, 4): losses, weights, correct pixels, labels out of range
  // Backward only.
  const void* grad = nullptr;  // of the losses: one number, or one for each pixel
  bool grad_is_scalar = false;
  Map grad_logits = {};
  int64_t bands = 0;  // of source rows, into which an image is cut

  Form form() const { return focal != 0 ? Form::focal : label_smoothing != 0 ? Form::smooth : Form::plain; }
};

struct RegionSums : Upsample {
  Labels target;  // or masks (batch, classes, rows.size, columns.size)
  bool masks, sigmoid;
  int64_t ignore_index;
  const void* weight = nullptr;  // (classes), or nullptr
  double* sums = nullptr;        // (units, classes, 4): of p, t, p * t and p * p
  int64_t* wrong = nullptr;      // (units): labels out of range
  // Backward only.
  const void* grad = nullptr;  // (4, batch, classes), of the sums
  Map grad_logits = {};
  int64_t bands = 0;  // of source rows, into which an image is cut
};

struct Argmax : Upsample {
  Labels labels;
};

struct Confusion : Upsample {
  Labels target;
  int64_t ignore_index;
  int64_t* counts;  // (classes, classes); added to atomically
  int64_t* invalid;
};

struct Softmax : Upsample {
  bool flip, add;
  Map out;
};

// Units: batch * rows.source.
APC_DECLARE_KERNEL(cross_entropy_groups, CrossEntropy)
APC_DECLARE_KERNEL(region_sums_groups, RegionSums)
APC_DECLARE_KERNEL(argmax_groups, Argmax)
APC_DECLARE_KERNEL(confusion_groups, Confusion)
APC_DECLARE_KERNEL(softmax_groups, Softmax)
// batch * bands:
APC_DECLARE_KERNEL(cross_entropy_backward_bands, CrossEntropy)
APC_DECLARE_KERNEL(region_sums_backward_bands, RegionSums)
