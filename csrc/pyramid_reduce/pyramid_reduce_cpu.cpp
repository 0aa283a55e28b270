// pyramid_reduce's CPU kernels, compiled once for each instruction set. Bytes: forward reads the weights once; backward
// reads them once and writes their gradients once. Statistics are kept in float64.
#include "../common/regions_cpu.h"
#include "pyramid_reduce.h"

namespace {

struct Unit {
  PyramidScale scale;
  int64_t index, first, count;  // of the scale, and its output channels
};

inline Unit unit_at(const PyramidReduce& p, int64_t unit) {
  const int64_t index = unit % p.num_scales, first = unit / p.num_scales * OUTPUTS;
  return {pyramid_scale(p, index), index, first, p.outputs - first < OUTPUTS ? p.outputs - first : OUTPUTS};
}

constexpr int64_t PIECE = 256, APART = PIECE + 16;  // rows a power of two apart share a few places of the cache

// The products of some output channels, (count, columns), of which each row has `row` numbers.
template <typename T>
void products_of(const PyramidReduce& p, const Unit& u, T* weight, T* sums, int64_t row) {
  const T* const from = as<T>(p.reductions[u.index].weight) + u.first * p.channels;
  const T* const right = as<T>(p.by_column) + u.scale.padded_before * p.channels;
  for (int64_t k = 0; k < p.channels; k += PIECE) {
    const int64_t depth = p.channels - k < PIECE ? p.channels - k : PIECE;
    for (int64_t m = 0; m < u.count; ++m) std::memcpy(weight + m * APART, from + m * p.channels + k, depth * sizeof(T));
    multiply<T, false>(u.count, row, depth, weight, APART, right + k * PANEL, p.channels * PANEL, PANEL, sums, row,
                       k > 0);
  }
}

template <typename T>
void pyramid_reduce_as(const PyramidReduce& p, int64_t begin, int64_t end) {
  Scratch<T> weight(OUTPUTS * APART);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit u = unit_at(p, unit);
    const Reduction& r = p.reductions[u.index];
    const int64_t columns = u.scale.columns, row = padded(columns);
    Scratch<T> sums(OUTPUTS * row);
    products_of<T>(p, u, weight, sums, row);
    for (int64_t m = 0; m < u.count; ++m) {
      const int64_t o = u.first + m;
      const T* const values = sums + m * row;
      double mean = 0, variance = 0;
      if (p.training) {
        for (int64_t n = 0; n < columns; ++n) mean += values[n];
        mean /= columns;
        for (int64_t n = 0; n < columns; ++n) variance += (values[n] - mean) * (values[n] - mean);
        variance /= columns;
        if (r.running_mean != nullptr) {
          T* const means = as<T>(r.running_mean);
          T* const variances = as<T>(r.running_var);
          const double unbiased = variance * columns / (columns - 1);
          means[o] = static_cast<T>(means[o] + r.momentum * (mean - means[o]));
          variances[o] = static_cast<T>(variances[o] + r.momentum * (unbiased - variances[o]));
        }
      } else {
        mean = as<T>(r.running_mean)[o], variance = as<T>(r.running_var)[o];
      }
      const double inverse = 1 / __builtin_sqrt(variance + r.eps);
      if (p.statistics != nullptr) {
        p.statistics[u.index * p.outputs + o] = mean;
        p.statistics[(p.num_scales + u.index) * p.outputs + o] = inverse;
        std::memcpy(as<T>(p.products) + p.outputs * u.scale.columns_before + o * columns, values, columns * sizeof(T));
      }
      const T center = static_cast<T>(mean), factor = static_cast<T>(inverse * as<T>(r.gamma)[o]);
      const T shift = as<T>(r.beta)[o];
      for (int64_t b = 0; b < p.batch; ++b) {
        T* const to = as<T>(p.result) + (b * p.outputs + o) * p.rows + u.scale.first_row;
        const T* const from = values + b * u.scale.regions;
        for (int64_t j = 0; j < u.scale.regions; ++j) {
          const T value = (from[j] - center) * factor + shift;
          to[j] = value < T(0) ? T(0) : value;  // NaN stays
        }
      }
    }
  }
}

// The gradients of some output channels' products, weights, gamma and beta.
template <typename T>
void pyramid_reduce_gradients_as(const PyramidReduce& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit u = unit_at(p, unit);
    const Reduction& r = p.reductions[u.index];
    const int64_t columns = u.scale.columns, before = p.outputs * u.scale.columns_before;
    T* const gradients = as<T>(p.gradients) + before + u.first * columns;
    for (int64_t m = 0; m < u.count; ++m) {
      const int64_t o = u.first + m;
      const T* const values = as<T>(p.products) + before + o * columns;
      T* const to = gradients + m * columns;
      const double mean = p.statistics[u.index * p.outputs + o];
      const double inverse = p.statistics[(p.num_scales + u.index) * p.outputs + o];
      double sum = 0, product = 0;
      for (int64_t n = 0; n < columns; ++n) {
        const int64_t at = (n / u.scale.regions * p.outputs + o) * p.rows + u.scale.first_row + n % u.scale.regions;
        to[n] = as<T>(p.result)[at] <= T(0) ? T(0) : as<T>(p.grad)[at];  // as PyTorch's ReLU: NaN passes
        sum += to[n], product += to[n] * ((values[n] - mean) * inverse);
      }
      as<T>(r.grad_gamma)[o] = static_cast<T>(product), as<T>(r.grad_beta)[o] = static_cast<T>(sum);
      const double scale = inverse * as<T>(r.gamma)[o];
      const double of_mean = p.training ? sum / columns : 0, of_deviation = p.training ? product / columns : 0;
      for (int64_t n = 0; n < columns; ++n)
        to[n] = static_cast<T>(scale * (to[n] - of_mean - (values[n] - mean) * inverse * of_deviation));
    }
    multiply<T, false>(u.count, p.channels, columns, gradients, columns,
                       as<T>(p.by_channel) + u.scale.columns_before * padded(p.channels), columns * PANEL, PANEL,
                       as<T>(r.grad_weight) + u.first * p.channels, p.channels);
  }
}

template <typename T>
void pyramid_reduce_region_gradients_as(const PyramidReduce& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t index = unit % p.num_scales, first = unit / p.num_scales * PANEL;
    const PyramidScale scale = pyramid_scale(p, index);
    const int64_t count = p.channels - first < PANEL ? p.channels - first : PANEL;
    const T* const weight = as<T>(p.reductions[index].weight) + first;
    region_gradient<T>(p, scale, first, p.outputs, 256, as<T>(p.gradients) + p.outputs * scale.columns_before,
                       as<T>(p.grad_regions), [&](int64_t k, int64_t some, T* to) {
                         for (int64_t o = 0; o < some; ++o)
                           for (int64_t i = 0; i < PANEL; ++i)
                             to[o * PANEL + i] = i < count ? weight[(k + o) * p.channels + i] : T(0);
                       });
  }
}

template <typename T>
void pyramid_reduce_pack_as(const PyramidReduce& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) pack_regions<T>(p, unit);
}

}  // namespace

APC_DEFINE_WIDE_KERNEL(pyramid_reduce_pack, PyramidReduce)
APC_DEFINE_WIDE_KERNEL(pyramid_reduce, PyramidReduce)
APC_DEFINE_WIDE_KERNEL(pyramid_reduce_gradients, PyramidReduce)
APC_DEFINE_WIDE_KERNEL(pyramid_reduce_region_gradients, PyramidReduce)
