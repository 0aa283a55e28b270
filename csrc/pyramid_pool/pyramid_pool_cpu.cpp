// pyramid_pool's CPU kernels, compiled once for each instruction set. Plain loops that vectorise; no library calls
// that could be linked from another set's object file.
#include "pyramid_pool.h"

namespace {

// sum[i] = or += the sum over `count` vectors `stride` apart, one vector after the other: in the order of memory.
template <typename T>
void add_vectors(Acc<T>* __restrict sum, const T* __restrict from, int64_t count, int64_t stride, int64_t length,
                 bool fresh) {
  if (fresh) {
    for (int64_t i = 0; i < length; ++i) sum[i] = load(from[i]);
    from += stride, --count;
  }
  for (; count > 0; --count, from += stride)
    for (int64_t i = 0; i < length; ++i) sum[i] += load(from[i]);
}

// Sums of more than this are taken in blocks of about the square root of their length: their rounding error, which
// grows with the number of additions one after the other, then grows with that root only.
constexpr int64_t SHORT = 32;

inline int64_t block_length(int64_t count) {
  int64_t block = SHORT;
  while (block * block < count) block *= 2;
  return block;
}

// sum[i] = the sum over `count` vectors `stride` apart; `block_sum` is scratch.
template <typename T>
void sum_vectors(Acc<T>* __restrict sum, Acc<T>* __restrict block_sum, const T* __restrict from, int64_t count,
                 int64_t stride, int64_t length) {
  if (count <= SHORT) return add_vectors<T>(sum, from, count, stride, length, true);
  const int64_t block = block_length(count);
  for (int64_t k = 0; k < count; k += block) {
    add_vectors<T>(block_sum, from + k * stride, count - k < block ? count - k : block, stride, length, true);
    add_vectors<Acc<T>>(sum, block_sum, 1, 0, length, k == 0);
  }
}

// The sum of `count` numbers side by side.
template <typename A>
inline A sum_line(const A* from, int64_t count) {
  A sum = 0;
  if (count <= SHORT) {
    for (int64_t i = 0; i < count; ++i) sum += from[i];
    return sum;
  }
  for (int64_t block = block_length(count); count > 0; from += block, count -= block) {
    A block_sum = 0;
    for (int64_t i = 0; i < (count < block ? count : block); ++i) block_sum += from[i];
    sum += block_sum;
  }
  return sum;
}

// Calls visit(region, row bin, column bin) for every region. Bins are counted through all scales, as regions are.
template <typename Visit>
inline void for_each_region(const PyramidPool& p, Visit visit) {
  int64_t region = 0;
  for (int k = 0, offset = 0; k < p.num_scales; offset += static_cast<int>(p.scales[k++]))
    for (int64_t i = offset; i < offset + p.scales[k]; ++i)
      for (int64_t j = offset; j < offset + p.scales[k]; ++j) visit(region++, i, j);
}

// Calls visit(region, column bin) for every region that holds a segment of the rows.
template <typename Visit>
inline void for_each_region_at(const PyramidPool& p, int segment, Visit visit) {
  int64_t first = 0;
  for (int k = 0, offset = 0; k < p.num_scales; ++k) {
    const int s = static_cast<int>(p.scales[k]), at = k * p.rows.count + segment;
    for (int i = p.rows.low[at]; i < p.rows.high[at]; ++i)
      for (int j = 0; j < s; ++j) visit(first + i * s + j, offset + j);
    first += int64_t(s) * s, offset += s;
  }
}

// Calls visit(bin) for every bin that holds a segment of the columns.
template <typename Visit>
inline void for_each_bin_at(const PyramidPool& p, int segment, Visit visit) {
  for (int k = 0, offset = 0; k < p.num_scales; offset += static_cast<int>(p.scales[k++]))
    for (int j = p.cols.low[k * p.cols.count + segment]; j < p.cols.high[k * p.cols.count + segment]; ++j)
      visit(offset + j);
}

// 1 / (rows * columns) of every region.
template <typename A>
void inverse_areas(const PyramidPool& p, A* inverse) {
  const auto length = [](const SegmentsView& axis, int64_t bin) -> int64_t {
    return axis.cuts[axis.last[bin]] - axis.cuts[axis.first[bin]];
  };
  for_each_region(p, [&](int64_t region, int64_t i, int64_t j) {
    inverse[region] = A(1) / static_cast<A>(length(p.rows, i) * length(p.cols, j));
  });
}

template <typename T>
void pool_planes_as(const PyramidPool& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t rows = p.rows.count;
  Scratch<A> sums(p.map.width), block(p.map.width), cells(p.cols.count * rows), bins(p.columns * rows),
      inverse(p.regions);
  inverse_areas<A>(p, inverse);
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* x =
        static_cast<const T*>(p.map.data) + plane / p.channels * p.map.stride_b + plane % p.channels * p.map.stride_c;
    for (int64_t e = 0; e < rows; ++e) {
      const int y = p.rows.cuts[e];
      sum_vectors<T>(sums, block, x + y * p.map.stride_y, p.rows.cuts[e + 1] - y, p.map.stride_y, p.map.width);
      for (int k = 0; k < p.cols.count; ++k)
        cells[k * rows + e] = sum_line<A>(sums + p.cols.cuts[k], p.cols.cuts[k + 1] - p.cols.cuts[k]);
    }
    for (int bin = 0; bin < p.columns; ++bin)
      add_vectors<A>(bins + bin * rows, cells + p.cols.first[bin] * rows, p.cols.last[bin] - p.cols.first[bin], rows,
                     rows, true);
    T* pooled = static_cast<T*>(p.pooled) + plane * p.regions;
    for_each_region(p, [&](int64_t region, int64_t i, int64_t j) {
      A sum = 0;
      for (int e = p.rows.first[i]; e < p.rows.last[i]; ++e) sum += bins[j * rows + e];
      pooled[region] = round_to<T>(sum * inverse[region]);
    });
  }
}

template <typename T>
void spread_planes_as(const PyramidPool& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  Scratch<A> scaled(p.regions), bins(p.columns), inverse(p.regions);
  Scratch<T> line(p.map.width);
  inverse_areas<A>(p, inverse);
  for (int64_t plane = begin; plane < end; ++plane) {
    T* x = static_cast<T*>(p.map.data) + plane / p.channels * p.map.stride_b + plane % p.channels * p.map.stride_c;
    const T* pooled = static_cast<const T*>(p.pooled) + plane * p.regions;
    for (int64_t region = 0; region < p.regions; ++region) scaled[region] = load(pooled[region]) * inverse[region];
    for (int e = 0; e < p.rows.count; ++e) {
      for (int bin = 0; bin < p.columns; ++bin) bins[bin] = 0;
      for_each_region_at(p, e, [&](int64_t region, int bin) { bins[bin] += scaled[region]; });
      for (int c = 0; c < p.cols.count; ++c) {
        A sum = 0;
        for_each_bin_at(p, c, [&](int bin) { sum += bins[bin]; });
        const T value = round_to<T>(sum);
        for (int i = p.cols.cuts[c]; i < p.cols.cuts[c + 1]; ++i) line[i] = value;
      }
      for (int y = p.rows.cuts[e]; y < p.rows.cuts[e + 1]; ++y)
        __builtin_memcpy(x + y * p.map.stride_y, line, p.map.width * sizeof(T));
    }
  }
}

// A run of channels of an image, in a row segment where units have one.
struct Unit {
  int64_t image, start, length;
  int segment;
};

inline Unit unit_at(const PyramidPool& p, int64_t unit, int segments) {
  const int64_t runs = (p.channels + CHANNEL_RUN - 1) / CHANNEL_RUN;
  const int64_t start = unit % runs * CHANNEL_RUN, rest = p.channels - start;
  return {unit / runs / segments, start, rest < CHANNEL_RUN ? rest : CHANNEL_RUN,
          static_cast<int>(unit / runs % segments)};
}

template <typename T>
void pool_rows_as(const PyramidPool& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  Scratch<A> cell(CHANNEL_RUN), rows(CHANNEL_RUN), line(CHANNEL_RUN), block(CHANNEL_RUN);
  for (int64_t index = begin; index < end; ++index) {
    const auto [b, start, length, e] = unit_at(p, index, p.rows.count);
    const T* x = static_cast<const T*>(p.map.data) + b * p.map.stride_b + start;
    A* bins = static_cast<A*>(p.row_sums) + (b * p.rows.count + e) * p.columns * p.channels + start;
    for (int bin = 0; bin < p.columns; ++bin)
      for (int64_t c = 0; c < length; ++c) bins[bin * p.channels + c] = 0;
    const int top = p.rows.cuts[e], bottom = p.rows.cuts[e + 1];
    const int64_t block_rows = block_length(bottom - top);
    for (int k = 0; k < p.cols.count; ++k) {
      const int left = p.cols.cuts[k], right = p.cols.cuts[k + 1];
      for (int y = top; y < bottom; ++y) {
        sum_vectors<T>(line, block, x + y * p.map.stride_y + left * p.map.stride_x, right - left, p.map.stride_x,
                       length);
        const bool last = y + 1 == bottom || (y + 1 - top) % block_rows == 0;
        add_vectors<A>(rows, line, 1, 0, length, (y - top) % block_rows == 0);
        if (last) add_vectors<A>(cell, rows, 1, 0, length, y - top < block_rows);
      }
      for_each_bin_at(p, k, [&](int bin) { add_vectors<A>(bins + bin * p.channels, cell, 1, 0, length, false); });
    }
  }
}

template <typename T>
void pool_row_bins_as(const PyramidPool& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  Scratch<A> sum(CHANNEL_RUN), inverse(p.regions);
  inverse_areas<A>(p, inverse);
  for (int64_t index = begin; index < end; ++index) {
    const auto [b, start, length, _] = unit_at(p, index, 1);
    const A* bins = static_cast<const A*>(p.row_sums) + b * p.rows.count * p.columns * p.channels + start;
    T* pooled = static_cast<T*>(p.pooled) + (b * p.channels + start) * p.regions;
    for_each_region(p, [&](int64_t region, int64_t i, int64_t j) {
      const int first = p.rows.first[i];
      add_vectors<A>(sum, bins + (first * p.columns + j) * p.channels, p.rows.last[i] - first, p.columns * p.channels,
                     length, true);
      for (int64_t c = 0; c < length; ++c) pooled[c * p.regions + region] = round_to<T>(sum[c] * inverse[region]);
    });
  }
}

template <typename T>
void spread_rows_as(const PyramidPool& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  Scratch<A> bins(p.columns * CHANNEL_RUN), sum(CHANNEL_RUN), inverse(p.regions);
  Scratch<T> cells(p.cols.count * CHANNEL_RUN);
  inverse_areas<A>(p, inverse);
  for (int64_t index = begin; index < end; ++index) {
    const auto [b, start, length, e] = unit_at(p, index, p.rows.count);
    const T* pooled = static_cast<const T*>(p.pooled) + (b * p.channels + start) * p.regions;
    for (int64_t i = 0; i < p.columns * CHANNEL_RUN; ++i) bins[i] = 0;
    for_each_region_at(p, e, [&](int64_t region, int bin) {
      A* to = bins + bin * CHANNEL_RUN;
      for (int64_t c = 0; c < length; ++c) to[c] += load(pooled[c * p.regions + region]) * inverse[region];
    });
    for (int k = 0; k < p.cols.count; ++k) {
      bool fresh = true;
      for_each_bin_at(p, k, [&](int bin) {
        add_vectors<A>(sum, bins + bin * CHANNEL_RUN, 1, 0, length, fresh);
        fresh = false;
      });
      T* cell = cells + k * CHANNEL_RUN;
      for (int64_t c = 0; c < length; ++c) cell[c] = round_to<T>(sum[c]);
    }
    T* x = static_cast<T*>(p.map.data) + b * p.map.stride_b + start;
    for (int y = p.rows.cuts[e]; y < p.rows.cuts[e + 1]; ++y)
      for (int k = 0; k < p.cols.count; ++k)
        for (int i = p.cols.cuts[k]; i < p.cols.cuts[k + 1]; ++i)
          __builtin_memcpy(x + y * p.map.stride_y + i * p.map.stride_x, cells + k * CHANNEL_RUN, length * sizeof(T));
  }
}

}  // namespace

APC_DEFINE_KERNEL(pool_planes, PyramidPool)
APC_DEFINE_KERNEL(spread_planes, PyramidPool)
APC_DEFINE_KERNEL(pool_rows, PyramidPool)
APC_DEFINE_KERNEL(pool_row_bins, PyramidPool)
APC_DEFINE_KERNEL(spread_rows, PyramidPool)
