// conv3x3's CPU kernels, compiled once for each instruction set: a vector holds adjacent channels of one position.
//
// With d a tile of the map, g the 3×3 weight and y the m×m of the result, y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A. The points of
// m = 2 are 0, ±1 and ∞; those of m = 4 are 0, ±a, ±b and ∞ (winograd.h). Maps whose channels do not lie side by side
// are read and written through lines of 32 channels in scratch memory. Bytes: each reads or writes the tiles once, and
// the map (m + 2)² / m² times, from caches after the first.
#include "../common/vectors_cpu.h"
#include "conv3x3.h"
#include "winograd.h"

namespace {

template <typename T>
using Vec = typename Pack<T>::type;

// A vector of adjacent numbers of which `count` may be read or written, others are 0.
template <typename T>
inline Vec<T> read(const T* from, int64_t count) {
  if (count >= Pack<T>::width) return *reinterpret_cast<const Vec<T>*>(from);
  T numbers[Pack<T>::width] = {};
  for (int64_t k = 0; k < count; ++k) numbers[k] = from[k];
  return *reinterpret_cast<const Vec<T>*>(numbers);
}

template <typename T>
inline void write(T* to, Vec<T> vector, int64_t count) {
  if (count >= Pack<T>::width) {
    *reinterpret_cast<Vec<T>*>(to) = vector;
    return;
  }
  T numbers[Pack<T>::width];
  *reinterpret_cast<Vec<T>*>(numbers) = vector;
  for (int64_t k = 0; k < count; ++k) to[k] = numbers[k];
}

// Where a row of tiles lies: its image, and the map's lines at its first result and onwards.
struct Place {
  int64_t image, line;
};

inline Place place_of(const Conv3x3& p, int64_t row) {
  const int64_t counted = p.first_row + row, of_image = p.dilation * p.tile_rows;
  const int64_t in_image = counted % of_image, phase = in_image / p.tile_rows;
  return {counted / of_image, phase + p.dilation * p.side * (in_image % p.tile_rows)};
}

inline int64_t first_column(const Conv3x3& p, int64_t tile) {
  return tile / p.tile_columns + p.dilation * p.side * (tile % p.tile_columns);
}

// Some channels of a map's lines for a row of tiles: line i is `dilation` below line i - 1, null where there is none.
template <typename T>
struct Lines {
  T* line[6];
  int64_t step;  // from a column to the next; channels lie side by side
};

template <typename T>
T* line_in(const Map& map, const Place& place, int64_t channel, int64_t line) {
  if (line < 0 || line >= map.height) return nullptr;
  return static_cast<T*>(map.data) + place.image * map.stride_b + channel * map.stride_c + line * map.stride_y;
}

template <typename T>
Lines<T> lines_in_place(const Conv3x3& p, const Map& map, const Place& place, int64_t channel, int first, int count) {
  Lines<T> lines{{}, map.stride_x};
  for (int i = 0; i < count; ++i)
    lines.line[i] = line_in<T>(map, place, channel, place.line + p.dilation * (first + i));
  return lines;
}

// Copies of lines with channels side by side.
template <typename T>
Lines<T> lines_copied(const Conv3x3& p, const Place& place, int64_t channel, int64_t channels, int first, int count,
                      T* scratch) {
  const int64_t width = p.map.width;
  Lines<T> lines{{}, STEP};
  for (int i = 0; i < count; ++i) {
    const T* const from = line_in<T>(p.map, place, channel, place.line + p.dilation * (first + i));
    if (from == nullptr) continue;
    lines.line[i] = scratch + i * width * STEP;
    if (p.map.stride_x == 1)
      transpose<T>(from, p.map.stride_c, channels, width, lines.line[i], STEP);
    else
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; ++c)
          lines.line[i][x * STEP + c] = from[c * p.map.stride_c + x * p.map.stride_x];
  }
  return lines;
}

// Writes tiles of some channels of a row: N lines and columns of the map, from FIRST on, are transformed by `axis`
// (N numbers to S + 2), down and across.
template <typename T, int S, int N, typename Axis>
void write_tiles(const Conv3x3& p, const Lines<T>& lines, T* tiles, int64_t channels, int first, const T* zeros,
                 Axis axis) {
  constexpr int W = Pack<T>::width, P = S + 2;
  for (int64_t tile = 0; tile < p.columns(); ++tile, tiles += p.row) {
    const T* at[N][N];
    const int64_t left = first_column(p, tile) + p.dilation * first;
    for (int j = 0; j < N; ++j) {
      const int64_t x = left + p.dilation * j;
      for (int i = 0; i < N; ++i)
        at[i][j] = lines.line[i] == nullptr || x < 0 || x >= p.map.width ? zeros : lines.line[i] + x * lines.step;
    }
    for (int64_t c = 0; c < channels; c += W) {
      Vec<T> half[N][P];  // of column j: the lines transformed
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) {
        Vec<T> column[N];
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) column[i] = read<T>(at[i][j] + c, channels - c);
        axis(column, half[j]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < P; ++i) {
        Vec<T> across[N], numbers[P];
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) across[j] = half[j][i];
        axis(across, numbers);
#pragma GCC unroll 6
        for (int j = 0; j < P; ++j) write<T>(tiles + (P * i + j) * p.plane + c, numbers[j], channels - c);
      }
    }
  }
}

template <typename T, int S>
void write_row_of_tiles(const Conv3x3& p, const Lines<T>& lines, T* tiles, int64_t channels, const T* zeros) {
  if (p.of_result)
    write_tiles<T, S, S>(p, lines, tiles, channels, 0, zeros,
                         [](const Vec<T>* from, Vec<T>* to) { Winograd<S, T>::of_gradient(from, to); });
  else
    write_tiles<T, S, S + 2>(p, lines, tiles, channels, -1, zeros,
                             [](const Vec<T>* from, Vec<T>* to) { Winograd<S, T>::of_input(from, to); });
}

template <typename T>
void tiles_of_map_as(const Conv3x3& p, int64_t begin, int64_t end) {
  const int64_t groups = (p.channels + GROUP - 1) / GROUP;
  const bool in_place = p.map.stride_c == 1;
  const int first = p.of_result ? 0 : -1, count = static_cast<int>(p.of_result ? p.side : p.side + 2);
  const int64_t together = in_place ? GROUP : STEP;
  Scratch<T> zeros(GROUP), scratch(in_place ? 1 : count * p.map.width * STEP);
  for (int64_t c = 0; c < GROUP; ++c) zeros[c] = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / groups, from = i % groups * GROUP;
    const Place place = place_of(p, row);
    for (int64_t c = from; c < from + GROUP && c < p.channels; c += together) {
      const int64_t channels = p.channels - c < together ? p.channels - c : together;
      const Lines<T> lines = in_place ? lines_in_place<T>(p, p.map, place, c, first, count)
                                      : lines_copied<T>(p, place, c, channels, first, count, scratch);
      T* const tiles = static_cast<T*>(p.tiles) + row * p.columns() * p.row + c;
      if (p.side == 2)
        write_row_of_tiles<T, 2>(p, lines, tiles, channels, zeros);
      else
        write_row_of_tiles<T, 4>(p, lines, tiles, channels, zeros);
    }
  }
}

// Writes S lines of a result from its tiles.
template <typename T, int S>
void read_tiles(const Conv3x3& p, const Lines<T>& lines, const Lines<T>& others, const T* tiles, int64_t channels,
                const T* bias) {
  constexpr int W = Pack<T>::width, P = S + 2;
  for (int64_t tile = 0; tile < p.columns(); ++tile, tiles += p.row) {
    const int64_t left = first_column(p, tile);
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t count = channels - c;
      Vec<T> half[P][S];
#pragma GCC unroll 6
      for (int j = 0; j < P; ++j) {
        Vec<T> column[P];
#pragma GCC unroll 6
        for (int i = 0; i < P; ++i) column[i] = read<T>(tiles + (P * i + j) * p.plane + c, count);
        Winograd<S, T>::of_product(column, half[j]);
      }
      const Vec<T> offset = bias == nullptr ? Vec<T>{} : read<T>(bias + c, count);
#pragma GCC unroll 4
      for (int i = 0; i < S; ++i) {
        if (lines.line[i] == nullptr) continue;
        Vec<T> across[P], numbers[S];
#pragma GCC unroll 6
        for (int j = 0; j < P; ++j) across[j] = half[j][i];
        Winograd<S, T>::of_product(across, numbers);
#pragma GCC unroll 4
        for (int j = 0; j < S; ++j) {
          const int64_t x = left + p.dilation * j;
          if (x >= p.map.width) continue;
          Vec<T> value = numbers[j] + offset;
          if (others.line[i] != nullptr) value += read<T>(others.line[i] + x * others.step + c, count);
          if (p.relu) value = value < Vec<T>{} ? Vec<T>{} : value;  // NaN stays
          write<T>(lines.line[i] + x * lines.step + c, value, count);
        }
      }
    }
  }
}

template <typename T>
void map_of_tiles_as(const Conv3x3& p, int64_t begin, int64_t end) {
  const int64_t groups = (p.channels + GROUP - 1) / GROUP, width = p.map.width;
  const bool in_place = p.map.stride_c == 1;
  const int64_t together = in_place ? GROUP : STEP;
  const int count = static_cast<int>(p.side);
  Scratch<T> scratch(in_place ? 1 : count * width * STEP);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / groups, from = i % groups * GROUP;
    const Place place = place_of(p, row);
    for (int64_t c = from; c < from + GROUP && c < p.channels; c += together) {
      const int64_t channels = p.channels - c < together ? p.channels - c : together;
      const Lines<T> targets = lines_in_place<T>(p, p.map, place, c, 0, count);
      Lines<T> lines = targets;
      if (!in_place) {
        lines.step = STEP;
        for (int k = 0; k < count; ++k)
          if (lines.line[k] != nullptr) lines.line[k] = scratch + k * width * STEP;
      }
      Lines<T> others{};
      if (p.other.data != nullptr) others = lines_in_place<T>(p, p.other, place, c, 0, count);
      const T* const tiles = static_cast<const T*>(p.tiles) + row * p.columns() * p.row + c;
      const T* const bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + c;
      if (p.side == 2)
        read_tiles<T, 2>(p, lines, others, tiles, channels, bias);
      else
        read_tiles<T, 4>(p, lines, others, tiles, channels, bias);
      if (in_place) continue;
      for (int k = 0; k < count; ++k) {
        if (targets.line[k] == nullptr) continue;
        if (p.map.stride_x == 1)
          transpose<T>(lines.line[k], STEP, width, channels, targets.line[k], p.map.stride_c);
        else
          for (int64_t x = 0; x < width; ++x)
            for (int64_t n = 0; n < channels; ++n)
              targets.line[k][n * p.map.stride_c + x * p.map.stride_x] = lines.line[k][x * STEP + n];
      }
    }
  }
}

// The 3×3 of a panel's columns at one number of the depth: taps[tap * STEP + column].
template <typename T>
void read_taps(const Conv3x3Weight& p, int64_t first, int64_t count, int64_t k, int64_t numbers, T* taps) {
  const int64_t along_depth = p.backwards ? p.stride_o : p.stride_i;
  const int64_t along_columns = p.backwards ? p.stride_i : p.stride_o;
  const T* const from = static_cast<const T*>(p.weight) + k * along_depth + first * along_columns;
  if (p.stride_x == 1 && p.stride_y == 3 && (along_depth == 9 || numbers == 1)) {
    // Whole vectors may be read where another row of the weight follows.
    constexpr int64_t W = Pack<T>::width, WHOLE = (9 + W - 1) / W * W;
    const bool follows = p.backwards && k + numbers < p.outputs;
    transpose<T>(from, along_columns, count, follows ? WHOLE : 9 * numbers, taps, STEP);
    return;
  }
  for (int64_t i = 0; i < numbers; ++i)
    for (int tap = 0; tap < 9; ++tap)
      for (int64_t n = 0; n < count; ++n)
        taps[(9 * i + tap) * STEP + n] =
            from[i * along_depth + tap / 3 * p.stride_y + tap % 3 * p.stride_x + n * along_columns];
}

template <typename T, int S>
void transform_panel(const Conv3x3Weight& p, int64_t panel) {
  constexpr int P = S + 2, W = Pack<T>::width;
  constexpr int64_t TOGETHER = 16;  // numbers of the depth
  const int64_t depth = p.backwards ? p.outputs : p.inputs, columns = p.backwards ? p.inputs : p.outputs;
  const int64_t first = panel * STEP, count = columns - first < STEP ? columns - first : STEP;
  const int64_t together = p.backwards ? 1 : TOGETHER;
  T* const to = static_cast<T*>(p.transformed) + panel * p.panel;
  T taps[9 * TOGETHER * STEP] = {};
  for (int64_t k = 0; k < depth; ++k) {
    if (k % together == 0) read_taps<T>(p, first, count, k, depth - k < together ? depth - k : together, taps);
    const T* const of_k = taps + k % together * 9 * STEP;
    for (int64_t n = 0; n < STEP; n += W) {
      Vec<T> half[3][P];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        Vec<T> column[3];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          const int tap = p.backwards ? 8 - (3 * i + j) : 3 * i + j;
          column[i] = *reinterpret_cast<const Vec<T>*>(of_k + tap * STEP + n);
        }
        Winograd<S, T>::of_weight(column, half[j]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < P; ++i) {
        const Vec<T> across[3] = {half[0][i], half[1][i], half[2][i]};
        Vec<T> numbers[P];
        Winograd<S, T>::of_weight(across, numbers);
#pragma GCC unroll 6
        for (int j = 0; j < P; ++j) *reinterpret_cast<Vec<T>*>(to + (P * i + j) * p.plane + k * STEP + n) = numbers[j];
      }
    }
  }
}

template <typename T>
void transform_weight_as(const Conv3x3Weight& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    p.side == 2 ? transform_panel<T, 2>(p, panel) : transform_panel<T, 4>(p, panel);
}

// The gradient of a weight from that of its transform, m = 2: Gᵀ · G, the adjoint of transform_weight.
template <typename T>
void weight_of_planes_as(const Conv3x3Weight& p, int64_t begin, int64_t end) {
  constexpr int W = Pack<T>::width;
  for (int64_t o = begin; o < end; ++o)
    for (int64_t c = 0; c < p.inputs; c += W) {
      const T* const from = static_cast<const T*>(p.transformed) + o * p.row + c;
      const int64_t count = p.inputs - c < W ? p.inputs - c : W;
      Vec<T> half[4][3];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Vec<T> column[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) column[i] = read<T>(from + (4 * i + j) * p.plane, count);
        Winograd<2, T>::of_weight_gradient(column, half[j]);
      }
      T taps[9 * W];
      for (int i = 0; i < 3; ++i) {
        const Vec<T> across[4] = {half[0][i], half[1][i], half[2][i], half[3][i]};
        Vec<T> numbers[3];
        Winograd<2, T>::of_weight_gradient(across, numbers);
        for (int j = 0; j < 3; ++j) *reinterpret_cast<Vec<T>*>(taps + (3 * i + j) * W) = numbers[j];
      }
      T* const to = static_cast<T*>(p.weight) + o * p.stride_o + c * p.stride_i;
      for (int64_t n = 0; n < count; ++n)
        for (int tap = 0; tap < 9; ++tap)
          to[n * p.stride_i + tap / 3 * p.stride_y + tap % 3 * p.stride_x] = taps[tap * W + n];
    }
}

}  // namespace

APC_DEFINE_WIDE_KERNEL(tiles_of_map, Conv3x3)
APC_DEFINE_WIDE_KERNEL(map_of_tiles, Conv3x3)
APC_DEFINE_WIDE_KERNEL(transform_weight, Conv3x3Weight)
APC_DEFINE_WIDE_KERNEL(weight_of_planes, Conv3x3Weight)
