// Parts that the CPU kernels of adaptive_context_norm's small tensors share: a part of a scale's channels, a channel's
// batch norm, sums.
#pragma once

#include "context_norm.h"
#include "product_cpu.h"

namespace {

// Channels of one scale.
struct Part {
  ScaleBlock block;
  int64_t first, width;  // of the scale
  int64_t at;            // of all scales
};

inline Part part_at(const ContextNorm& p, int64_t unit) {
  const int64_t count = parts_of(p), first = unit % count * PART, rest = p.channels - first;
  const ScaleBlock block = scale_block(p, unit / count);
  return {block, first, rest < PART ? rest : PART, block.first_channel + first};
}

// to (rows x to_stride) = from (rows x width), then zeros.
template <typename A>
inline void widen(const A* from, int64_t stride, int64_t rows, int64_t width, double* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < width; ++k) to[i * to_stride + k] = from[i * stride + k];
    for (int64_t k = width; k < to_stride; ++k) to[i * to_stride + k] = 0;
  }
}

// sums (PART) = the numbers of an image's regions, weighted: weight (regions) times rows (regions x PART).
template <typename A>
inline void sum_regions(const A* weight, const double* rows, int64_t regions, double* sums) {
  for (int64_t k = 0; k < PART; ++k) sums[k] = 0;
  for (int64_t j = 0; j < regions; ++j)
    for (int64_t k = 0; k < PART; ++k) sums[k] += weight[j] * rows[j * PART + k];
}

// A batch norm of one channel.
struct Channel {
  double mean, scale, gamma, beta;

  double normal(double value) const { return (value - mean) * scale; }
  double operator()(double value) const { return gamma * normal(value) + beta; }
};

template <typename A>
inline Channel channel_at(const ContextNorm& p, int64_t c) {
  const int64_t all = p.num_scales * p.channels;
  const double beta = p.beta == nullptr ? 0 : *as<A>(p.beta, c);
  return {p.statistics[c], 1 / __builtin_sqrt(p.statistics[all + c] + p.eps), *as<A>(p.gamma, c), beta};
}

inline void store_statistics(const ContextNorm& p, int64_t c, double mean, double variance) {
  p.statistics[c] = mean, p.statistics[p.num_scales * p.channels + c] = variance;
}

}  // namespace
