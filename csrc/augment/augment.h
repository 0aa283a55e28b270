// augment on the CPU: what the operator (augment.cpp) hands to the kernel (augment_cpu.cpp).
//
// Bytes that have to move: the part of the image that the window shows, 3 bytes a pixel, and the result, 12 bytes a
// pixel where it is normalised. Everything between lies in two lines of the image and one of the result.
#pragma once

#include "../common/interpolation.h"
#include "../common/isa.h"

struct AugmentStep {
  enum Kind { brightness, contrast, saturation, hue } kind;  // in the order of apc_kernels/ops/augment
  float value;
};

struct Augment {
  const uint8_t* image;
  int64_t stride_c, stride_y, stride_x;
  Axis rows, columns;                // of the image, resized
  int64_t top, left, height, width;  // of the window
  bool flip;
  const AugmentStep* steps;
  int64_t step_count;
  bool is_normalised;
  float mean[3], scale[3];
  void* out;  // (3, height, width): uint8, or float32 where it is normalised
};

// Units are rows of the window.
APC_DECLARE_KERNEL(augment_rows, Augment)
