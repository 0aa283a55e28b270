// A map (batch, channels, height, width) as the CPU kernels see it; strides in elements.
#pragma once

#include <cstdint>

struct Map {
  void* data;
  int64_t stride_b, stride_c, stride_y, stride_x, height, width;
};
