// The products A·V of adaptive_context_norm and their batch norm, on small tensors alone: CPU kernels, compiled once
// for each instruction set. A is float, or double.
#include "context_norm_cpu.h"

namespace {

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
      *as<A>(p.linear, row + j) = dot<double>(vectors + j * p.channels, of_means.data, p.channels) / p.positions;
      for (int64_t k = 0; k < count; ++k)
        *as<A>(p.quadratic, image * p.pairs + block.first_pair + j * count + k) =
            (squares[j * wide + k] + squares[k * wide + j]) / p.positions;
    }
  }
}

}  // namespace

APC_DEFINE_WIDE_KERNEL(project, ContextNorm)
APC_DEFINE_WIDE_KERNEL(product_norm, ContextNorm)
APC_DEFINE_WIDE_KERNEL(product_norm_sums, ContextNorm)
APC_DEFINE_WIDE_KERNEL(vector_gradients, ContextNorm)
APC_DEFINE_WIDE_KERNEL(region_gradients, ContextNorm)
APC_DEFINE_WIDE_KERNEL(moment_gradients, ContextNorm)

namespace APC_ISA {
void product_statistics(const ContextNorm& p, int64_t begin, int64_t end) { product_statistics_of(p, begin, end); }
}  // namespace APC_ISA
