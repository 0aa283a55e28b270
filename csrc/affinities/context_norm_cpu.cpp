// adaptive_context_norm's small tensors: CPU kernels, compiled once for each instruction set. A is float, or double.
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

template <typename A>
inline const A* as(const void* numbers, int64_t offset) {
  return static_cast<const A*>(numbers) + offset;
}
template <typename A>
inline A* as(void* numbers, int64_t offset) {
  return static_cast<A*>(numbers) + offset;
}

// to (rows x to_stride) = from (rows x width), then zeros.
template <typename A>
inline void widen(const A* from, int64_t stride, int64_t rows, int64_t width, double* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < width; ++k) to[i * to_stride + k] = from[i * stride + k];
    for (int64_t k = width; k < to_stride; ++k) to[i * to_stride + k] = 0;
  }
}

// The sum of a[n] * b[n], in lanes that vectorise.
template <typename A, typename B>
inline double dot(const A* a, const B* b, int64_t length) {
  constexpr int LANES = 16;
  double lanes[LANES] = {};
  int64_t n = 0;
  for (; n + LANES <= length; n += LANES)
    for (int i = 0; i < LANES; ++i) lanes[i] += static_cast<double>(a[n + i]) * b[n + i];
  for (int i = 0; n + i < length; ++i) lanes[i] += static_cast<double>(a[n + i]) * b[n + i];
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
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

template <typename A>
void guide_statistics_as(const ContextNorm& p, int64_t begin, int64_t end) {
  const int64_t all = p.num_scales * p.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    for (int64_t c = part.at; c < part.at + part.width; ++c) {
      double mean = 0, squares = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const A* pooled = as<A>(p.pooled, b * all + part.block.first_channel);
        mean += p.features[b * all + c] = dot(pooled, as<A>(p.guide, c * p.channels), p.channels);
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
          *as<A>(p.bias, j) + dot(as<A>(p.weight, j * p.channels), guide.data, p.channels);
  }
}

template <typename A>
void project_as(const ContextNorm& p, int64_t begin, int64_t end) {
  Scratch<double> projection(p.channels * PART), regions(p.most_regions * p.channels), vectors(p.most_regions * PART);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    const int64_t count = part.block.regions;
    for (int64_t i = 0; i < p.channels * PART && part.width < PART; ++i) projection[i] = 0;
    transpose<double>(as<A>(p.projection, part.at * p.channels), p.channels, part.width, p.channels, projection.data,
                      PART);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = b * p.rows + part.block.first_row;
      widen(as<A>(p.regions, row * p.channels), p.channels, count, p.channels, regions, p.channels);
      product<double>({regions, p.channels, 1}, {projection, PART}, count, p.channels, PART, vectors, PART, false);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t k = 0; k < part.width; ++k)
          p.vectors[(row + j) * p.channels + part.first + k] = vectors[j * PART + k];
    }
  }
}

void product_statistics_of(const ContextNorm& p, int64_t begin, int64_t end) {
  const int64_t most = p.most_regions;
  Scratch<double> vectors(most * PART), products(most * PART), means(p.batch * PART), variances(p.batch * PART);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    const int64_t count = part.block.regions;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = b * p.rows + part.block.first_row;
      widen(p.vectors + row * p.channels + part.first, p.channels, count, part.width, vectors, PART);
      sum_regions(p.mean + row, vectors, count, means + b * PART);
      const double* covariance = p.covariance + b * p.pairs + part.block.first_pair;
      product<double>({covariance, count, 1}, {vectors, PART}, count, count, PART, products, PART, false);
      double* variance = variances + b * PART;
      for (int64_t k = 0; k < PART; ++k) variance[k] = 0;
      for (int64_t j = 0; j < count; ++j)
        for (int64_t k = 0; k < PART; ++k) variance[k] += vectors[j * PART + k] * products[j * PART + k];
    }
    for (int64_t k = 0; k < part.width; ++k) {
      double mean = 0, squares = 0;
      for (int64_t b = 0; b < p.batch; ++b) mean += means[b * PART + k];
      mean /= p.batch;
      for (int64_t b = 0; b < p.batch; ++b) {
        const double distance = means[b * PART + k] - mean;
        squares += variances[b * PART + k] + distance * distance;
      }
      store_statistics(p, part.at + k, mean, squares / p.batch);
    }
  }
}

// The vectors of a part and image, (regions x PART), and their sums weighted with the affinities' means, rounded as
// the center that adaptive_context subtracts.
template <typename A>
inline void vectors_of(const ContextNorm& p, const Part& part, int64_t image, A* center, double* vectors,
                       double* centers) {
  const int64_t row = image * p.rows + part.block.first_row;
  for (int64_t j = 0; j < part.block.regions; ++j) center[j] = static_cast<A>(p.mean[row + j]);
  widen(p.vectors + row * p.channels + part.first, p.channels, part.block.regions, part.width, vectors, PART);
  sum_regions(center, vectors, part.block.regions, centers);
}

template <typename A>
void product_norm_as(const ContextNorm& p, int64_t begin, int64_t end) {
  Scratch<double> vectors(p.most_regions * PART);
  Scratch<A> center(p.most_regions);
  double centers[PART];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = b * p.rows + part.block.first_row;
      vectors_of<A>(p, part, b, center, vectors, centers);
      for (int64_t j = 0; part.first == 0 && j < part.block.regions; ++j) *as<A>(p.center, row + j) = center[j];
      for (int64_t k = 0; k < part.width; ++k) {
        const Channel channel = channel_at<A>(p, part.at + k);
        const double factor = channel.gamma * channel.scale;
        for (int64_t j = 0; j < part.block.regions; ++j)
          *as<A>(p.norm_rows, (row + j) * p.channels + part.first + k) = vectors[j * PART + k] * factor;
        *as<A>(p.shift, b * p.num_scales * p.channels + part.at + k) =
            channel.beta + factor * (centers[k] - channel.mean);
      }
    }
  }
}

template <typename A>
void product_norm_sums_as(const ContextNorm& p, int64_t begin, int64_t end) {
  const int64_t all = p.num_scales * p.channels;
  Scratch<double> vectors(p.most_regions * PART);
  Scratch<A> center(p.most_regions);
  double centers[PART], of_shift[PART], of_factor[PART];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    for (int64_t k = 0; k < PART; ++k) of_shift[k] = of_factor[k] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      vectors_of<A>(p, part, b, center, vectors, centers);
      const A* grad_rows = as<A>(p.grad_rows, (b * p.rows + part.block.first_row) * p.channels + part.first);
      const A* grad_shift = as<A>(p.grad_shift, b * all + part.at);
      for (int64_t j = 0; j < part.block.regions; ++j)
        for (int64_t k = 0; k < part.width; ++k) of_factor[k] += grad_rows[j * p.channels + k] * vectors[j * PART + k];
      for (int64_t k = 0; k < part.width; ++k) {
        of_factor[k] += grad_shift[k] * (centers[k] - p.statistics[part.at + k]);
        of_shift[k] += grad_shift[k];
      }
    }
    for (int64_t k = 0; k < part.width; ++k) {
      const int64_t c = part.at + k;
      const Channel channel = channel_at<A>(p, c);
      p.sums[c] = -channel.gamma * channel.scale * of_shift[k] / p.batch;
      p.sums[all + c] = -0.5 * of_factor[k] * channel.gamma * (channel.scale * channel.scale * channel.scale) / p.batch;
      *as<A>(p.grad_gamma, c) = of_factor[k] * channel.scale, *as<A>(p.grad_beta, c) = of_shift[k];
    }
  }
}

// Gradients of the vectors, and with them those of the projection.
template <typename A>
void vector_gradients_as(const ContextNorm& p, int64_t begin, int64_t end) {
  const int64_t all = p.num_scales * p.channels, most = p.most_regions, columns = (p.channels + 15) / 16 * 16;
  Scratch<double> vectors(most * PART), products(most * PART), regions(most * columns), of_projection(PART * columns);
  Scratch<A> center(most);
  double centers[PART], means[PART];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    const int64_t count = part.block.regions;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = b * p.rows + part.block.first_row;
      const A* grad_rows = as<A>(p.grad_rows, row * p.channels + part.first);
      const A* grad_shift = as<A>(p.grad_shift, b * all + part.at);
      const double *mean = p.mean + row, *covariance = p.covariance + b * p.pairs + part.block.first_pair;
      vectors_of<A>(p, part, b, center, vectors, centers);
      sum_regions(mean, vectors, count, means);
      product<double>({covariance, count, 1}, {vectors, PART}, count, count, PART, products, PART, false);
      for (int64_t k = 0; k < part.width; ++k) {
        const Channel channel = channel_at<A>(p, part.at + k);
        const double factor = channel.gamma * channel.scale, of_variance = p.sums[all + part.at + k];
        const double of_mean = p.sums[part.at + k] + 2 * of_variance * (means[k] - channel.mean);
        for (int64_t j = 0; j < count; ++j) {
          double& gradient = products[j * PART + k];  // a product until now
          gradient = grad_rows[j * p.channels + k] * factor + center[j] * (grad_shift[k] * factor) + mean[j] * of_mean +
                     2 * of_variance * gradient;
          p.grad_vectors[(row + j) * p.channels + part.first + k] = gradient;
        }
      }
      widen(as<A>(p.regions, row * p.channels), p.channels, count, p.channels, regions, columns);
      product<double>({products, 1, PART}, {regions, columns}, part.width, count, columns, of_projection, columns,
                      b > 0);
    }
    for (int64_t k = 0; k < part.width; ++k)
      for (int64_t c = 0; c < p.channels; ++c)
        *as<A>(p.grad_projection, (part.at + k) * p.channels + c) = of_projection[k * columns + c];
  }
}

template <typename A>
void region_gradients_as(const ContextNorm& p, int64_t begin, int64_t end) {
  Scratch<double> projection(p.channels * PART), gradients(p.most_regions * PART);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part part = part_at(p, unit);
    const int64_t count = part.block.regions;
    widen(as<A>(p.projection, part.block.first_channel * p.channels + part.first), p.channels, p.channels, part.width,
          projection, PART);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = b * p.rows + part.block.first_row;
      product<double>({p.grad_vectors + row * p.channels, p.channels, 1}, {projection, PART}, count, p.channels, PART,
                      gradients, PART, false);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t k = 0; k < part.width; ++k)
          *as<A>(p.grad_regions, (row + j) * p.channels + part.first + k) = gradients[j * PART + k];
    }
  }
}

// The gradient of an affinity vector A through mean and covariance, linear + quadratic * (A - mean).
template <typename A>
void moment_gradients_as(const ContextNorm& p, int64_t begin, int64_t end) {
  const int64_t all = p.num_scales * p.channels, most = p.most_regions, columns = (most + 15) / 16 * 16;
  Scratch<double> weighted(most * p.channels), transposed(p.channels * columns), squares(most * columns);
  Scratch<double> of_means(p.channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / p.num_scales;
    const ScaleBlock block = scale_block(p, unit % p.num_scales);
    const int64_t row = image * p.rows + block.first_row, count = block.regions, wide = (count + 15) / 16 * 16;
    const double *vectors = p.vectors + row * p.channels, *mean = p.mean + row;
    const double *of_mean = p.sums + block.first_channel, *of_variance = of_mean + all;
    for (int64_t c = 0; c < p.channels; ++c) of_means[c] = -p.statistics[block.first_channel + c];
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < p.channels; ++c) {
        of_means[c] += mean[j] * vectors[j * p.channels + c];
        weighted[j * p.channels + c] = vectors[j * p.channels + c] * of_variance[c];
      }
    for (int64_t c = 0; c < p.channels; ++c) of_means[c] = of_mean[c] + 2 * of_variance[c] * of_means[c];
    for (int64_t i = 0; i < p.channels * wide; ++i) transposed[i] = 0;
    transpose<double>(vectors, p.channels, count, p.channels, transposed.data, wide);
    product<double>({weighted, p.channels, 1}, {transposed, wide}, count, p.channels, wide, squares, wide, false);
    for (int64_t j = 0; j < count; ++j) {
      *as<A>(p.linear, row + j) = dot(vectors + j * p.channels, of_means.data, p.channels) / p.positions;
      for (int64_t k = 0; k < count; ++k)
        *as<A>(p.quadratic, image * p.pairs + block.first_pair + j * count + k) =
            (squares[j * wide + k] + squares[k * wide + j]) / p.positions;
    }
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
            dot(as<A>(p.quadratic, pair + j * count), as<A>(p.slope_moments, pair + j * count), count);
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
APC_DEFINE_WIDE_KERNEL(project, ContextNorm)
APC_DEFINE_WIDE_KERNEL(product_norm, ContextNorm)
APC_DEFINE_WIDE_KERNEL(product_norm_sums, ContextNorm)
APC_DEFINE_WIDE_KERNEL(vector_gradients, ContextNorm)
APC_DEFINE_WIDE_KERNEL(region_gradients, ContextNorm)
APC_DEFINE_WIDE_KERNEL(moment_gradients, ContextNorm)
APC_DEFINE_WIDE_KERNEL(guide_sums, ContextNorm)
APC_DEFINE_WIDE_KERNEL(guide_gradients, ContextNorm)

namespace APC_ISA {
void product_statistics(const ContextNorm& p, int64_t begin, int64_t end) { product_statistics_of(p, begin, end); }
}  // namespace APC_ISA
