// Adaptive pooling bins along one axis, exactly PyTorch's: bin i of s covers [floor(i*size/s), ceil((i+1)*size/s)).
//
// Bins of several scales overlap. Cut at every bin edge, an axis falls into *segments*: longest runs of positions that
// lie in the same bins of every scale. A map is read (or written) once, segment by segment, whatever the scales.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define APC_HOST_DEVICE __host__ __device__
#else
#define APC_HOST_DEVICE
#endif

constexpr int MAX_SCALES = 64, MAX_SCALE = 32768;
constexpr int64_t MAX_SIZE = int64_t(1) << 31;  // of an axis

// `static`: a copy for each translation unit, because the same text is compiled for several instruction sets.
// In int on the GPU, where a division of 64 bits costs a hundred instructions; in int64_t elsewhere.
template <typename Integer>
static inline APC_HOST_DEVICE Integer bin_begin(Integer i, Integer size, Integer s) {
  return i * size / s;
}
template <typename Integer>
static inline APC_HOST_DEVICE Integer bin_end(Integer i, Integer size, Integer s) {
  return ((i + 1) * size + s - 1) / s;
}

// The segments of an axis, as a CPU kernel sees them. Bins are counted through all scales: scale 0's, then scale 1's.
struct SegmentsView {
  int count;         // segments
  const int* cuts;   // count + 1 positions; segment k covers [cuts[k], cuts[k + 1])
  const int* first;  // one for each bin: it covers the segments [first[bin], last[bin])
  const int* last;
  const int* low;  // one for each (scale, segment): the bins of that scale that hold it are [low, high), counted within
  const int* high;  // the scale
};
