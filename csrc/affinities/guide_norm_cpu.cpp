// The guide of adaptive_context_norm and its batch norm: CPU kernels, compiled once for each instruction set. A is
// float, or double.
#include "context_norm_cpu.h"

namespace {

template <typename A>
void guide_statistics_as(const ContextNorm& p, int64_t begin, int64_t end) {
  const int64_t all = p.num_scales * p.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    for (int64_t c = part.at; c < part.at + part.width; ++c) {
      double mean = 0, squares = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const A* pooled = as<A>(p.pooled, b * all + part.block.first_channel);
        mean += p.features[b * all + c] = dot<double>(pooled, as<A>(p.guide, c * p.channels), p.channels);
      }
      mean /= p.batch;
      for (int64_t b = 0; b < p.batch; ++b) {
        const double distance = p.features[b * all + c] - mean;
        squares += distance * distance;
      }
      store_statistics(p, c, mean, squares / p.batch);
    }
  }
}

template <typename A>
void guide_biases_as(const ContextNorm& p, int64_t begin, int64_t end) {
  Scratch<double> guide(p.channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / p.num_scales;
    const ScaleBlock block = scale_block(p, unit % p.num_scales);
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t at = block.first_channel + c;
      const double value = channel_at<A>(p, at)(p.features[image * p.num_scales * p.channels + at]);
      guide[c] = value < 0 ? 0 : value;
    }
    for (int64_t j = block.first_row; j < block.first_row + block.regions; ++j)
      *as<A>(p.biases, image * p.rows + j) =
          *as<A>(p.bias, j) + dot<double>(as<A>(p.weight, j * p.channels), guide.data, p.channels);
  }
}

// The gradient of the biases goes on to the guide, and to the weight that multiplies it.
template <typename A>
void guide_sums_as(const ContextNorm& p, int64_t begin, int64_t end) {
  const int64_t all = p.num_scales * p.channels;
  Scratch<double> of_bias(p.most_regions), of_weight(p.most_regions * PART);
  double of_beta[PART], of_gamma[PART], through[PART];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    const int64_t count = part.block.regions;
    for (int64_t i = 0; i < count * PART; ++i) of_weight[i] = 0;
    for (int64_t k = 0; k < PART; ++k) of_beta[k] = of_gamma[k] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = b * p.rows + part.block.first_row, pair = b * p.pairs + part.block.first_pair;
      for (int64_t k = 0; k < PART; ++k) through[k] = 0;
      for (int64_t j = 0; j < count; ++j) {
        const double curved =
            dot<double>(as<A>(p.quadratic, pair + j * count), as<A>(p.slope_moments, pair + j * count), count);
        const double linear = *as<A>(p.linear, row + j);
        of_bias[j] = *as<A>(p.grad_bias, row + j) + linear * *as<A>(p.slope, row + j) + curved;
        const A* weight = as<A>(p.weight, (part.block.first_row + j) * p.channels + part.first);
        for (int64_t k = 0; k < part.width; ++k) through[k] += of_bias[j] * weight[k];
      }
      for (int64_t k = 0; k < part.width; ++k) {
        const Channel channel = channel_at<A>(p, part.at + k);
        const double feature = p.features[b * all + part.at + k], guide = channel(feature);
        const double gradient = guide <= 0 ? 0 : through[k];
        for (int64_t j = 0; j < count; ++j) of_weight[j * PART + k] += of_bias[j] * (guide <= 0 ? 0 : guide);
        p.through[b * all + part.at + k] = gradient;
        of_beta[k] += gradient, of_gamma[k] += gradient * channel.normal(feature);
      }
    }
    for (int64_t k = 0; k < part.width; ++k) {
      const int64_t c = part.at + k;
      p.sums[c] = of_beta[k] / p.batch, p.sums[all + c] = of_gamma[k] / p.batch;
      *as<A>(p.grad_gamma, c) = of_gamma[k], *as<A>(p.grad_beta, c) = of_beta[k];
      for (int64_t j = 0; j < count; ++j)
        *as<A>(p.grad_weight, (part.block.first_row + j) * p.channels + part.first + k) = of_weight[j * PART + k];
    }
  }
}

// Gradients of the guide's convolution, and of the map's mean: a constant at all positions.
template <typename A>
void guide_gradients_as(const ContextNorm& p, int64_t begin, int64_t end) {
  const int64_t all = p.num_scales * p.channels, columns = (p.channels + 15) / 16 * 16;
  Scratch<double> of_features(p.batch * p.channels), pooled(p.batch * columns), of_guide(PART * columns);
  Scratch<double> guide(p.channels * PART), constant(p.batch * PART);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    const int64_t first = part.block.first_channel;
    for (int64_t c = 0; c < p.channels; ++c) {
      const Channel channel = channel_at<A>(p, first + c);
      for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t at = b * all + first + c;
        const double normal = channel.normal(p.features[at]);
        of_features[b * p.channels + c] =
            channel.gamma * channel.scale * (p.through[at] - p.sums[first + c] - normal * p.sums[all + first + c]);
      }
    }
    widen(as<A>(p.pooled, first), all, p.batch, p.channels, pooled, columns);
    product<double>({of_features + part.first, 1, p.channels}, {pooled, columns}, part.width, p.batch, columns,
                    of_guide, columns, false);
    widen(as<A>(p.guide, first * p.channels + part.first), p.channels, p.channels, part.width, guide, PART);
    product<double>({of_features, p.channels, 1}, {guide, PART}, p.batch, p.channels, PART, constant, PART, false);
    for (int64_t k = 0; k < part.width; ++k) {
      for (int64_t c = 0; c < p.channels; ++c)
        *as<A>(p.grad_guide, (part.at + k) * p.channels + c) = of_guide[k * columns + c];
      for (int64_t b = 0; b < p.batch; ++b)
        *as<A>(p.constant, b * all + part.at + k) = constant[b * PART + k] / p.positions;
    }
  }
}

}  // namespace

APC_DEFINE_WIDE_KERNEL(guide_statistics, ContextNorm)
APC_DEFINE_WIDE_KERNEL(guide_biases, ContextNorm)
APC_DEFINE_WIDE_KERNEL(guide_sums, ContextNorm)
APC_DEFINE_WIDE_KERNEL(guide_gradients, ContextNorm)
