// adaptive_context's CPU kernels, compiled once for each instruction set.
//
// A tile of positions passes through: logits from pieces of x, affinities, then, piece by piece of the channels, the
// product with the regions and what follows it. Affinities live in a scratch of one tile; pieces of maps stay in L1.
#include "affinities_cpu.h"

namespace {

// The arrays of a scale, typed, as a tile sees them.
template <typename A>
struct Views {
  ScaleBlock block;
  const A *regions, *weight, *shift, *center, *linear, *quadratic, *constant;

  Views(const AdaptiveContext& p, const Tile& tile) : block(scale_block(p, tile.scale)) {
    const int64_t row = tile.image * p.rows + block.first_row;
    const int64_t channel = tile.image * p.num_scales * p.channels + block.first_channel;
    regions = at(p.regions, row * p.channels);
    weight = at(p.weight, block.first_row * p.channels);
    shift = at(p.shift, channel), constant = at(p.constant, channel);
    center = at(p.center, row), linear = at(p.linear, row);
    quadratic = at(p.quadratic, tile.image * p.pairs + block.first_pair);
  }
  static const A* at(const void* data, int64_t offset) {
    return data == nullptr ? nullptr : static_cast<const A*>(data) + offset;
  }
};

inline int64_t piece_at(const Affinities& p, int64_t c) {
  return p.channels - c < CHANNELS ? p.channels - c : CHANNELS;
}

// Subtracts the centre, except past the end.
template <typename A>
void subtract_center(const A* affinity, const A* center, int64_t regions, int64_t length, A* centered) {
  for (int64_t j = 0; j < regions; ++j) {
    const A value = center == nullptr ? 0 : center[j];
    for (int64_t n = 0; n < TILE; ++n) centered[j * TILE + n] = n < length ? affinity[j * TILE + n] - value : 0;
  }
}

// z (count x TILE) for the channels from c on, before the shift.
template <typename A>
void products(const AdaptiveContext& p, const Views<A>& v, const A* centered, int64_t c, int64_t count, A* z) {
  product<A>({v.regions + c, 1, p.channels}, {centered, TILE}, count, v.block.regions, TILE, z, TILE, false);
}

// The gradient of z as the relu lets it through: NaN passes, as it does in PyTorch.
template <typename T>
void load_gradient(const AdaptiveContext& p, const Views<Acc<T>>& v, const Tile& tile, const Acc<T>* centered,
                   int64_t c, int64_t count, Acc<T>* z, Acc<T>* gradient) {
  load_tile<T>(p.grad, tile, v.block.first_channel + c, count, gradient);
  if (v.shift == nullptr) return;
  products<Acc<T>>(p, v, centered, c, count, z);
  for (int64_t i = 0; i < count; ++i) {
    const Acc<T> shift = v.shift[c + i];
    for (int64_t n = 0; n < TILE; ++n)
      gradient[i * TILE + n] = z[i * TILE + n] + shift <= 0 ? 0 : gradient[i * TILE + n];
  }
}

template <typename T>
void aggregate_as(const AdaptiveContext& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  Scratch<A> x((p.residual ? p.channels : CHANNELS) * TILE), affinity(p.most_regions * TILE), z(CHANNELS * TILE);
  for_each_tile(p, begin, end, [&](const Tile& tile) {
    const Views<A> v(p, tile);
    affinities_of<T>(p, v.block, tile, x, p.residual, affinity, nullptr);
    if (v.center != nullptr) subtract_center<A>(affinity, v.center, v.block.regions, tile.length, affinity);
    for (int64_t c = 0; c < p.channels; c += CHANNELS) {
      const int64_t count = piece_at(p, c);
      products<A>(p, v, affinity, c, count, z);
      for (int64_t i = 0; i < count; ++i) {
        A* row = z + i * TILE;
        if (v.shift != nullptr) {
          const A shift = v.shift[c + i];
          for (int64_t n = 0; n < TILE; ++n) row[n] = row[n] + shift <= 0 ? 0 : row[n] + shift;
        }
        if (p.residual)
          for (int64_t n = 0; n < TILE; ++n) row[n] += x[(c + i) * TILE + n];
      }
      store_tile<T>(p.z, tile, v.block.first_channel + c, count, z);
    }
  });
}

template <typename T>
void sum_region_gradients_as(const AdaptiveContext& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t most = p.most_regions;
  Scratch<A> piece(CHANNELS * TILE), z(CHANNELS * TILE), affinity(most * TILE), slope(most * TILE),
      centered(most * TILE), transposed(TILE * padded(most)), through(most * TILE);
  for_each_tile(p, begin, end, [&](const Tile& tile) {
    const Views<A> v(p, tile);
    const int64_t regions = v.block.regions, columns = padded(regions);
    A* matrix = static_cast<A*>(p.unit_matrices) + tile.unit * p.channels * padded(most);
    A* squares = static_cast<A*>(p.unit_squares) + tile.unit * most * padded(most);
    A* rows = static_cast<A*>(p.unit_rows) + tile.unit * most;
    affinities_of<T>(p, v.block, tile, piece, false, affinity, slope);
    subtract_center<A>(affinity, v.center, regions, tile.length, centered);
    transpose_tile<A>(centered, regions, tile.length, true, transposed);
    for (int64_t c = 0; c < p.channels; c += CHANNELS) {
      const int64_t count = piece_at(p, c);
      load_gradient<T>(p, v, tile, centered, c, count, z, piece);
      product<A>({piece, TILE, 1}, {transposed, columns}, count, TILE, columns, matrix + c * columns, columns,
                 !tile.fresh);
      product<A>({v.regions + c, p.channels, 1}, {piece, TILE}, regions, count, TILE, through, TILE, c > 0);
    }
    product<A>({slope, TILE, 1}, {transposed, columns}, regions, TILE, columns, squares, columns, !tile.fresh);
    for (int64_t j = 0; j < regions; ++j) {
      const A sum = dot<A>(slope + j * TILE, through + j * TILE, tile.length);
      rows[j] = tile.fresh ? sum : rows[j] + sum;
    }
  });
}

template <typename T>
void write_x_gradients_as(const AdaptiveContext& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t most = p.most_regions;
  Scratch<A> x(p.channels * TILE), piece(CHANNELS * TILE), z(CHANNELS * TILE), affinity(most * TILE),
      slope(most * TILE), centered(most * TILE), through(most * TILE), transposed(TILE * padded(most));
  for_each_tile(p, begin, end, [&](const Tile& tile) {
    const Views<A> v(p, tile);
    const int64_t regions = v.block.regions, columns = padded(regions);
    A* matrix = static_cast<A*>(p.unit_matrices) + tile.unit * p.channels * padded(most);
    A* rows = static_cast<A*>(p.unit_rows) + tile.unit * most;
    affinities_of<T>(p, v.block, tile, x, true, affinity, slope);
    subtract_center<A>(affinity, v.center, regions, tile.length, centered);
    if (v.linear != nullptr) {
      for (int64_t j = 0; j < regions; ++j)
        for (int64_t n = 0; n < TILE; ++n) through[j * TILE + n] = v.linear[j];
      product<A>({v.quadratic, regions, 1}, {centered, TILE}, regions, regions, TILE, through, TILE, true);
    }
    if (p.grad.data != nullptr) {
      for (int64_t c = 0; c < p.channels; c += CHANNELS) {
        const int64_t count = piece_at(p, c);
        load_gradient<T>(p, v, tile, centered, c, count, z, piece);
        product<A>({v.regions + c, p.channels, 1}, {piece, TILE}, regions, count, TILE, through, TILE,
                   c > 0 || v.linear != nullptr);
      }
    }
    for (int64_t j = 0; j < regions; ++j) {
      A* gradient = through + j * TILE;
      const A sum = dot<A>(slope + j * TILE, gradient, tile.length);
      for (int64_t n = 0; n < TILE; ++n) gradient[n] = n < tile.length ? gradient[n] * slope[j * TILE + n] : 0;
      rows[j] = tile.fresh ? sum : rows[j] + sum;
    }
    transpose_tile<A>(through, regions, tile.length, false, transposed);
    product<A>({x, TILE, 1}, {transposed, columns}, p.channels, TILE, columns, matrix, columns, !tile.fresh);
    for (int64_t c = 0; c < p.channels; c += CHANNELS) {
      const int64_t count = piece_at(p, c);
      product<A>({v.weight + c, 1, p.channels}, {through, TILE}, count, regions, TILE, z, TILE, false);
      if (p.residual) {
        load_tile<T>(p.grad, tile, v.block.first_channel + c, count, piece);
        for (int64_t i = 0; i < count * TILE; ++i) z[i] += piece[i];
      }
      if (v.constant != nullptr)
        for (int64_t i = 0; i < count; ++i)
          for (int64_t n = 0; n < TILE; ++n) z[i * TILE + n] += v.constant[c + i];
      store_tile<T>(p.grad_x, tile, v.block.first_channel + c, count, z);
    }
  });
}

// The sum over chunks, and images where there are several, of one number of each unit.
template <typename A>
inline A sum_units(const A* first, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += first[i * stride];
  return static_cast<A>(sum);
}

template <typename A>
void merge_region_gradients_as(const AdaptiveContext& p, int64_t begin, int64_t end) {
  const int64_t most = p.most_regions, step = p.batch * p.num_scales;
  const int64_t matrix = p.channels * padded(most), square = most * padded(most);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / p.num_scales, scale = index % p.num_scales;
    const ScaleBlock block = scale_block(p, scale);
    const int64_t regions = block.regions, columns = padded(regions), row = image * p.rows + block.first_row;
    const A* matrices = static_cast<const A*>(p.unit_matrices) + index * matrix;
    const A* squares = static_cast<const A*>(p.unit_squares) + index * square;
    const A* rows = static_cast<const A*>(p.unit_rows) + index * most;
    for (int64_t j = 0; j < regions; ++j) {
      A* to = static_cast<A*>(p.grad_regions) + (row + j) * p.channels;
      for (int64_t c = 0; c < p.channels; ++c)
        to[c] = sum_units<A>(matrices + c * columns + j, p.chunks, step * matrix);
      A* moments = static_cast<A*>(p.slope_moments) + image * p.pairs + block.first_pair + j * regions;
      for (int64_t k = 0; k < regions; ++k)
        moments[k] = sum_units<A>(squares + j * columns + k, p.chunks, step * square);
      static_cast<A*>(p.slope)[row + j] = sum_units<A>(squares + j * columns + regions, p.chunks, step * square);
      static_cast<A*>(p.grad_bias)[row + j] = sum_units<A>(rows + j, p.chunks, step * most);
    }
    A* shift = static_cast<A*>(p.grad_shift) + image * p.num_scales * p.channels + block.first_channel;
    for (int64_t c = 0; c < p.channels; ++c)
      shift[c] = sum_units<A>(matrices + c * columns + regions, p.chunks, step * matrix);
  }
}

template <typename A>
void merge_weight_gradients_as(const AdaptiveContext& p, int64_t begin, int64_t end) {
  const int64_t most = p.most_regions, matrix = p.channels * padded(most);
  for (int64_t scale = begin; scale < end; ++scale) {
    const ScaleBlock block = scale_block(p, scale);
    const int64_t columns = padded(block.regions);
    const A* matrices = static_cast<const A*>(p.unit_matrices) + scale * matrix;
    for (int64_t j = 0; j < block.regions; ++j) {
      A* to = static_cast<A*>(p.grad_weight) + (block.first_row + j) * p.channels;
      for (int64_t c = 0; c < p.channels; ++c)
        to[c] = sum_units<A>(matrices + c * columns + j, p.chunks * p.batch, p.num_scales * matrix);
      for (int64_t image = 0; image < p.batch; ++image)
        static_cast<A*>(p.grad_bias)[image * p.rows + block.first_row + j] =
            sum_units<A>(static_cast<const A*>(p.unit_rows) + (image * p.num_scales + scale) * most + j, p.chunks,
                         p.batch * p.num_scales * most);
    }
  }
}

}  // namespace

APC_DEFINE_KERNEL(aggregate, AdaptiveContext)
APC_DEFINE_KERNEL(sum_region_gradients, AdaptiveContext)
APC_DEFINE_KERNEL(write_x_gradients, AdaptiveContext)
APC_DEFINE_WIDE_KERNEL(merge_region_gradients, AdaptiveContext)
APC_DEFINE_WIDE_KERNEL(merge_weight_gradients, AdaptiveContext)
