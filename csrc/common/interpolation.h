// Bilinear interpolation along one axis, as PyTorch defines it, in exact integers: apc_kernels/ops/interpolation.py.
#pragma once

#include <cstdint>

namespace {

// The elements an output position lies between, and the numerator of the second one's weight.
struct Position {
  int64_t index, next, rest;
};

struct Axis {
  int64_t source, size;
  int64_t step, start, denominator;

  Axis() = default;
  Axis(int64_t source, int64_t size, bool align_corners) : source(source), size(size) {
    if (align_corners) {
      step = size > 1 ? source - 1 : 0, start = 0, denominator = size > 1 ? size - 1 : 1;
    } else {
      step = 2 * source, start = source - size, denominator = 2 * size;
    }
  }

  Position at(int64_t position) const {
    const int64_t numerator = position * step + start;
    if (numerator <= 0) return {0, 0, 0};
    const int64_t index = numerator / denominator, rest = numerator % denominator;
    return {index, rest > 0 && index + 1 < source ? index + 1 : index, rest};
  }

  // The first position whose index is at least this one: those of an index are [first(index), first(index + 1)).
  int64_t first(int64_t index) const {
    if (index <= 0) return 0;
    if (step == 0 || index >= source) return size;
    const int64_t numerator = index * denominator - start;
    const int64_t position = (numerator + step - 1) / step;
    return position < size ? position : size;
  }
};

}  // namespace
