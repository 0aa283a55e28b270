// encode's CPU kernels, compiled once for each instruction set. Bytes: forward reads x once, and writes distances and
// weights; backward reads x, distances and weights once, and writes x's gradient. A tile of positions stays in the
// second-level cache.
#include "../common/lanes_cpu.h"
#include "../common/panels_cpu.h"
#include "encode.h"

namespace {

constexpr int64_t TILE = 64;    // positions: two panels
constexpr int64_t PIECE = 256;  // of a sum over channels

inline int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

// Positions of an image: `count` from `first` on.
struct Tile {
  int64_t image, first, count;
};

// Calls visit(tile) for the tiles of a unit.
template <typename Visit>
void each_tile(const Encode& p, int64_t unit, Visit visit) {
  const int64_t image = unit / chunks_of(p), begin = unit % chunks_of(p) * CHUNK;
  const int64_t end = begin + CHUNK < p.positions ? begin + CHUNK : p.positions;
  for (int64_t n = begin; n < end; n += TILE) visit(Tile{image, n, end - n < TILE ? end - n : TILE});
}

// The features of a tile relative to the mean codeword, (C, TILE); zeros follow the last position.
template <typename T>
void load_features(const Encode& p, const Tile& tile, Acc<T>* features) {
  using A = Acc<T>;
  const T* const x = as<T>(p.x) + tile.image * p.x_b + tile.first * p.x_n;
  const A* const center = as<A>(p.center);
  if (p.x_n != 1 && p.x_c == 1) transpose<A>(x, p.x_n, tile.count, p.channels, features, TILE);
  for (int64_t c = 0; c < p.channels; ++c) {
    A* const to = features + c * TILE;
    if (p.x_n == 1 || p.x_c != 1)
      for (int64_t n = 0; n < tile.count; ++n) to[n] = load(x[c * p.x_c + n * p.x_n]);
    for (int64_t n = 0; n < tile.count; ++n) to[n] -= center[c];
    for (int64_t n = tile.count; n < TILE; ++n) to[n] = 0;
  }
}

// The codewords relative to their mean, times a factor.
template <typename A>
void load_words(const Encode& p, A factor, A* words) {
  for (int64_t k = 0; k < p.words; ++k)
    for (int64_t c = 0; c < p.channels; ++c)
      words[k * p.channels + c] = factor * (as<A>(p.codewords)[k * p.channels + c] - as<A>(p.center)[c]);
}

// Turns distances (K, TILE) into weights: the softmax over the codewords of scale · distance.
template <typename A>
void softmax(const Encode& p, const A* distances, A* weights) {
  constexpr int64_t W = Pack<A>::width;
  typedef typename Pack<A>::type Vec;
  const A* const scale = as<A>(p.scale);
  for (int64_t n = 0; n < TILE; n += W) {
    Vec most = scale[0] * load_lanes<A>(distances + n), sum{};
    for (int64_t k = 0; k < p.words; ++k) {  // logits are stored: the compiler could fuse product and difference below
      const Vec logit = scale[k] * load_lanes<A>(distances + k * TILE + n);
      store_lanes<A>(weights + k * TILE + n, logit);
      most = logit > most ? logit : most;
    }
    for (int64_t k = 0; k < p.words; ++k) {
      const Vec e = exp_lanes(load_lanes<A>(weights + k * TILE + n) - most);
      store_lanes<A>(weights + k * TILE + n, e);
      sum += e;
    }
    for (int64_t k = 0; k < p.words; ++k)
      store_lanes<A>(weights + k * TILE + n, load_lanes<A>(weights + k * TILE + n) / sum);
  }
}

// Rows (K, TILE) to or from (B, K, N), of the positions of a tile.
template <typename A>
void store_tile(const Encode& p, const Tile& tile, const A* rows, void* to) {
  for (int64_t k = 0; k < p.words; ++k)
    std::memcpy(as<A>(to) + (tile.image * p.words + k) * p.positions + tile.first, rows + k * TILE,
                tile.count * sizeof(A));
}
template <typename A>
void load_tile(const Encode& p, const Tile& tile, const void* from, A* rows) {
  for (int64_t k = 0; k < p.words; ++k) {
    std::memcpy(rows + k * TILE, as<A>(from) + (tile.image * p.words + k) * p.positions + tile.first,
                tile.count * sizeof(A));
    for (int64_t n = tile.count; n < TILE; ++n) rows[k * TILE + n] = 0;
  }
}

// sums (C, padded K) += features (C, TILE) · rows (K, TILE)ᵀ, and counts[k] += Σ rows[k].
template <typename A>
void add_products(const Encode& p, const Tile& tile, const A* features, const A* rows, A* columns, A* sums,
                  double* counts, bool add) {
  const int64_t words = padded(p.words);
  for (int64_t k = 0; k < p.words; ++k) {
    double count = 0;
    for (int64_t n = 0; n < tile.count; ++n) count += rows[k * TILE + n];
    counts[k] += count;
  }
  for (int64_t n = 0; n < TILE; ++n)
    for (int64_t k = 0; k < words; ++k)
      columns[n * words + k] = k < p.words && n < tile.count ? rows[k * TILE + n] : A(0);
  multiply<A, false, PIECE>(p.channels, words, TILE, features, TILE, columns, PANEL, words, sums, words, add);
}

template <typename T>
void encode_chunks_as(const Encode& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t padded_words = padded(p.words);
  Scratch<A> features(p.channels * TILE), words(p.words * p.channels), squares(p.words);
  Scratch<A> distances(p.words * TILE), weights(p.words * TILE), columns(TILE * padded_words);
  load_words<A>(p, 1, words);
  for (int64_t k = 0; k < p.words; ++k) squares[k] = dot<A>(words + k * p.channels, words + k * p.channels, p.channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    A* const sums = as<A>(p.sums) + unit * p.channels * padded_words;
    double* const counts = p.counts + unit * 3 * p.words;
    for (int64_t k = 0; k < p.words; ++k) counts[k] = 0;
    each_tile(p, unit, [&](const Tile& tile) {
      load_features<T>(p, tile, features);
      A of_features[TILE] = {};
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t n = 0; n < TILE; ++n) of_features[n] += features[c * TILE + n] * features[c * TILE + n];
      multiply<A, false, PIECE>(p.words, TILE, p.channels, words, p.channels, features, PANEL, TILE, distances, TILE);
      for (int64_t k = 0; k < p.words; ++k)
        for (int64_t n = 0; n < TILE; ++n)
          distances[k * TILE + n] = of_features[n] + squares[k] - 2 * distances[k * TILE + n];
      softmax<A>(p, distances, weights);
      store_tile<A>(p, tile, distances, p.distances);
      store_tile<A>(p, tile, weights, p.weights);
      add_products<A>(p, tile, features, weights, columns, sums, counts, tile.first % CHUNK > 0);
    });
  }
}

// Adds up the shares of an image's chunks, and subtracts Σ weights · codeword.
template <typename A>
void encode_sums_as(const Encode& p, int64_t begin, int64_t end) {
  const int64_t words = padded(p.words), chunks = chunks_of(p);
  Scratch<double> counts(p.words);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t k = 0; k < p.words; ++k) {
      counts[k] = 0;
      for (int64_t i = 0; i < chunks; ++i) counts[k] += p.counts[(b * chunks + i) * 3 * p.words + k];
    }
    for (int64_t c = begin; c < end; ++c)
      for (int64_t k = 0; k < p.words; ++k) {
        A sum = 0;
        for (int64_t i = 0; i < chunks; ++i) sum += as<A>(p.sums)[((b * chunks + i) * p.channels + c) * words + k];
        const A word = as<A>(p.codewords)[k * p.channels + c] - as<A>(p.center)[c];
        as<A>(p.encoded)[(b * p.channels + c) * p.words + k] = sum - static_cast<A>(counts[k]) * word;
      }
  }
}

// Turns the gradients of a tile's weights into those of its distances, adds up the gradient of scale.
template <typename A>
void distance_gradients(const Encode& p, const Tile& tile, const A* of_words, const A* weights, const A* distances,
                        A* grads, double* of_scale) {
  A sums[TILE] = {};
  for (int64_t k = 0; k < p.words; ++k)
    for (int64_t n = 0; n < TILE; ++n) {
      grads[k * TILE + n] -= of_words[k];
      sums[n] += weights[k * TILE + n] * grads[k * TILE + n];
    }
  for (int64_t k = 0; k < p.words; ++k) {
    double sum = 0;
    for (int64_t n = 0; n < tile.count; ++n) {
      const A through = weights[k * TILE + n] * (grads[k * TILE + n] - sums[n]);
      sum += through * distances[k * TILE + n];
      grads[k * TILE + n] = as<A>(p.scale)[k] * through;
    }
    for (int64_t n = tile.count; n < TILE; ++n) grads[k * TILE + n] = 0;
    of_scale[k] += sum;
  }
}

template <typename T>
void encode_chunk_gradients_as(const Encode& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t padded_words = padded(p.words);
  Scratch<A> features(p.channels * TILE), result(p.channels * TILE), columns(TILE * padded_words);
  Scratch<A> left(2 * p.words * p.channels), rows(2 * p.words * TILE), distances(p.words * TILE), of_words(p.words);
  // Two of the three terms of the features' gradient are one product: of the codewords, and of the gradient. The
  // smaller term comes first: a number that is added to a large sum is rounded to it.
  load_words<A>(p, -2, left);
  A *const grads = rows, *const weights = rows + p.words * TILE;
  for (int64_t unit = begin; unit < end; ++unit) {
    A* const sums = as<A>(p.sums) + unit * p.channels * padded_words;
    double *const counts = p.counts + unit * 3 * p.words, *const of_scale = counts + 2 * p.words;
    for (int64_t k = 0; k < 3 * p.words; ++k) counts[k] = 0;
    const A* const grad = as<A>(p.grad) + unit / chunks_of(p) * p.words * p.channels;
    std::memcpy(left + p.words * p.channels, grad, p.words * p.channels * sizeof(A));
    for (int64_t k = 0; k < p.words; ++k)
      of_words[k] = dot<A>(left + k * p.channels, grad + k * p.channels, p.channels) / -2;
    each_tile(p, unit, [&](const Tile& tile) {
      load_features<T>(p, tile, features);
      load_tile<A>(p, tile, p.distances, distances);
      load_tile<A>(p, tile, p.weights, weights);
      for (int64_t k = 0; k < p.words; ++k)
        for (int64_t n = 0; n < tile.count; ++n) counts[p.words + k] += weights[k * TILE + n];
      multiply<A, false, PIECE>(p.words, TILE, p.channels, grad, p.channels, features, PANEL, TILE, grads, TILE);
      distance_gradients<A>(p, tile, of_words, weights, distances, grads, of_scale);
      add_products<A>(p, tile, features, grads, columns, sums, counts, tile.first % CHUNK > 0);
      if (p.grad_x == nullptr) return;
      multiply<A, true, PIECE>(p.channels, TILE, 2 * p.words, left, p.channels, rows, PANEL, TILE, result, TILE);
      A twice[TILE] = {};
      for (int64_t k = 0; k < p.words; ++k)
        for (int64_t n = 0; n < TILE; ++n) twice[n] += 2 * grads[k * TILE + n];
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t n = 0; n < TILE; ++n) result[c * TILE + n] += twice[n] * features[c * TILE + n];
      T* const to = as<T>(p.grad_x) + tile.image * p.grad_b + tile.first * p.grad_n;
      if (p.grad_n != 1 && p.grad_c == 1) {
        transpose<A>(result.data, TILE, p.channels, tile.count, to, p.grad_n);
      } else {
        for (int64_t c = 0; c < p.channels; ++c)
          for (int64_t n = 0; n < tile.count; ++n) to[c * p.grad_c + n * p.grad_n] = round_to<T>(result[c * TILE + n]);
      }
    });
  }
}

// Adds up all chunks' shares of the gradients of codewords and scale.
template <typename A>
void encode_sum_gradients_as(const Encode& p, int64_t begin, int64_t end) {
  const int64_t words = padded(p.words), chunks = chunks_of(p);
  for (int64_t k = 0; k < p.words; ++k) {
    double of_scale = 0, of_distances = 0;
    Scratch<double> weights(p.batch);
    for (int64_t b = 0; b < p.batch; ++b) {
      weights[b] = 0;
      for (int64_t i = b * chunks; i < (b + 1) * chunks; ++i) {
        const double* const counts = p.counts + i * 3 * p.words;
        of_distances += counts[k], weights[b] += counts[p.words + k], of_scale += counts[2 * p.words + k];
      }
    }
    if (begin == 0) as<A>(p.grad_scale)[k] = static_cast<A>(of_scale);
    for (int64_t c = begin; c < end; ++c) {
      double sum = 0, others = 0;
      for (int64_t i = 0; i < p.batch * chunks; ++i) sum += as<A>(p.sums)[(i * p.channels + c) * words + k];
      for (int64_t b = 0; b < p.batch; ++b) others += weights[b] * as<A>(p.grad)[(b * p.words + k) * p.channels + c];
      const double word = as<A>(p.codewords)[k * p.channels + c] - as<A>(p.center)[c];
      as<A>(p.grad_words)[k * p.channels + c] = static_cast<A>(2 * (of_distances * word - sum) - others);
    }
  }
}

}  // namespace

APC_DEFINE_KERNEL(encode_chunks, Encode)
APC_DEFINE_WIDE_KERNEL(encode_sums, Encode)
APC_DEFINE_KERNEL(encode_chunk_gradients, Encode)
APC_DEFINE_WIDE_KERNEL(encode_sum_gradients, Encode)
