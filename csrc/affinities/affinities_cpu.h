// Affinities on the CPU, tile by tile: pieces of a map as (channels x TILE) arrays in the accumulator's type, whatever
// the map's layout and dtype, and sigmoid(weight * x + bias) of a tile as (regions x TILE).
//
// Positions past the end of an image fill a tile up. Their affinities and their slopes are set to 0, and so are the
// gradients that are loaded for them: they add nothing to sums, and are never stored.
#pragma once

#include "affinities.h"
#include "product_cpu.h"

namespace {

struct Unit {
  int64_t image, scale, first_tile, last_tile;
};

// Units of all scales take turns, so that threads that get equal shares of units get equal work.
inline Unit unit_at(const Affinities& p, int64_t unit) {
  const int64_t scale = unit % p.num_scales, image = unit / p.num_scales % p.batch;
  const int64_t chunk = unit / p.num_scales / p.batch, tiles = (p.positions + TILE - 1) / TILE;
  return {image, scale, chunk * tiles / p.chunks, (chunk + 1) * tiles / p.chunks};
}

struct Tile {
  int64_t unit, image, scale;
  int64_t first, length;  // positions
  bool fresh;             // the first of its unit
};

// Calls visit(tile) for every tile of the units [begin, end).
template <typename Visit>
inline void for_each_tile(const Affinities& p, int64_t begin, int64_t end, Visit visit) {
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at(p, index);
    for (int64_t t = unit.first_tile; t < unit.last_tile; ++t) {
      const int64_t first = t * TILE, rest = p.positions - first;
      visit(Tile{index, unit.image, unit.scale, first, rest < TILE ? rest : TILE, t == unit.first_tile});
    }
  }
}

// Calls run(address, n, count) for the pixels of a tile: `count` of them from the tile's n-th on lie in one row.
template <typename T, typename Run>
inline void for_each_run(const Map& map, const Tile& tile, int64_t channel, Run run) {
  T* base = static_cast<T*>(map.data) + tile.image * map.stride_b + channel * map.stride_c;
  int64_t y = tile.first / map.width, x = tile.first % map.width;
  for (int64_t n = 0; n < tile.length; ++y, x = 0) {
    const int64_t rest = tile.length - n, count = map.width - x < rest ? map.width - x : rest;
    run(base + y * map.stride_y + x * map.stride_x, n, count);
    n += count;
  }
}

// to (count x TILE) = the channels [first, first + count) at the tile's positions.
template <typename T>
void load_tile(const Map& map, const Tile& tile, int64_t first, int64_t count, Acc<T>* __restrict to) {
  if (map.stride_x == 1 || map.stride_c != 1) {
    for (int64_t c = 0; c < count; ++c)
      for_each_run<const T>(map, tile, first + c, [&](const T* __restrict from, int64_t n, int64_t length) {
        Acc<T>* row = to + c * TILE + n;
        for (int64_t i = 0; i < length; ++i) row[i] = load(from[i * map.stride_x]);
      });
  } else {
    for_each_run<const T>(map, tile, first, [&](const T* __restrict from, int64_t n, int64_t length) {
      transpose<Acc<T>>(from, map.stride_x, length, count, to + n, TILE);
    });
  }
  for (int64_t c = 0; c < count; ++c)
    for (int64_t n = tile.length; n < TILE; ++n) to[c * TILE + n] = 0;
}

template <typename T>
void store_tile(const Map& map, const Tile& tile, int64_t first, int64_t count, const Acc<T>* __restrict from) {
  if (map.stride_x == 1 || map.stride_c != 1) {
    for (int64_t c = 0; c < count; ++c)
      for_each_run<T>(map, tile, first + c, [&](T* __restrict to, int64_t n, int64_t length) {
        const Acc<T>* row = from + c * TILE + n;
        for (int64_t i = 0; i < length; ++i) to[i * map.stride_x] = round_to<T>(row[i]);
      });
  } else {
    for_each_run<T>(map, tile, first, [&](T* __restrict to, int64_t n, int64_t length) {
      transpose<Acc<T>>(from + n, TILE, count, length, to, map.stride_x);
    });
  }
}

// exp(t) for t <= 0, within two units in the last place, subnormal results and NaN included.
inline float exp_of_negative(float t) {
  t = t < -104.0f ? -104.0f : t;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its last bits then hold
  const float shifted = t * 1.44269504f + magic;
  const int32_t n = static_cast<int32_t>(as_bits(shifted) - as_bits(magic));
  const float whole = shifted - magic;
  float r = t - whole * 0.693359375f;  // ln 2 in two parts, the first of few bits
  r = r + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * (r * r) + r + 1.0f;
  const int32_t half = n >> 1;  // 2^n in two factors: 2^-150 itself is no float
  return sum * as_float(static_cast<uint32_t>(half + 127) << 23) *
         as_float(static_cast<uint32_t>(n - half + 127) << 23);
}
inline double exp_of_negative(double t) { return __builtin_exp(t); }

inline float magnitude(float value) { return __builtin_fabsf(value); }
inline double magnitude(double value) { return __builtin_fabs(value); }

// Logits (regions x TILE) become affinities; `slopes`, if they are asked for, their derivatives A * (1 - A).
template <typename A, bool SLOPES>
void to_affinities(A* __restrict logits, A* __restrict slopes, const A* bias, int64_t regions, int64_t length) {
  for (int64_t j = 0; j < regions; ++j) {
    A* __restrict row = logits + j * TILE, * __restrict slope = SLOPES ? slopes + j * TILE : nullptr;
    const A offset = bias[j];
    for (int64_t n = 0; n < TILE; ++n) {
      const A logit = row[n] + offset, e = exp_of_negative(-magnitude(logit)), d = 1 / (1 + e);
      row[n] = logit < 0 ? e * d : d;
      if constexpr (SLOPES) slope[n] = e * d * d;
    }
    for (int64_t n = length; n < TILE; ++n) row[n] = 0;
    for (int64_t n = length; SLOPES && n < TILE; ++n) slope[n] = 0;
  }
}

// The affinities of a tile. `x` is where pieces of the map go: all channels one after the other if `keep`, otherwise
// always the same CHANNELS rows.
template <typename T>
void affinities_of(const Affinities& p, const ScaleBlock& block, const Tile& tile, Acc<T>* x, bool keep,
                   Acc<T>* affinity, Acc<T>* slope) {
  const Acc<T>* weight = static_cast<const Acc<T>*>(p.weight) + block.first_row * p.channels;
  for (int64_t c = 0; c < p.channels; c += CHANNELS) {
    const int64_t count = p.channels - c < CHANNELS ? p.channels - c : CHANNELS;
    Acc<T>* piece = keep ? x + c * TILE : x;
    load_tile<T>(p.x, tile, block.first_channel + c, count, piece);
    product<Acc<T>>({weight + c, p.channels, 1}, {piece, TILE}, block.regions, count, TILE, affinity, TILE, c > 0);
  }
  const Acc<T>* bias = static_cast<const Acc<T>*>(p.bias) + tile.image * p.rows + block.first_row;
  if (slope == nullptr)
    to_affinities<Acc<T>, false>(affinity, slope, bias, block.regions, tile.length);
  else
    to_affinities<Acc<T>, true>(affinity, slope, bias, block.regions, tile.length);
}

// to (TILE x padded columns): `from` (rows x TILE) transposed, then a column of ones, then zeros; all zeros past the
// end.
template <typename A>
void transpose_tile(const A* from, int64_t rows, int64_t length, bool ones, A* to) {
  const int64_t columns = padded(rows);
  for (int64_t n = 0; n < TILE; ++n)
    for (int64_t j = rows; j < columns; ++j) to[n * columns + j] = ones && j == rows && n < length ? 1 : 0;
  transpose<A>(from, TILE, rows, TILE, to, columns);
}

}  // namespace
