// conv3x3's CPU kernels, compiled once for each instruction set: plain loops along a row of tiles, which vectorise.
//
// With d a 4×4 tile of the map, g the 3×3 weight and y the 2×2 of the result, y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, where
//        1  0 -1  0          1   0   0
//   Bᵀ = 0  1  1  0     G = 1/2 1/2 1/2     Aᵀ = 1  1  1  0
//        0 -1  1  0         1/2 -1/2 1/2         0  1 -1 -1
//        0  1  0 -1          0   0   1
#include "conv3x3.h"

namespace {

// even[j] = row[2j], odd[j] = row[2j + 1] for `count` pairs of which the last may lack its second.
template <typename T>
void separate(const T* __restrict row, int64_t width, T* __restrict even, T* __restrict odd) {
  const int64_t pairs = width / 2;
  for (int64_t j = 0; j < pairs; ++j) even[j] = row[2 * j], odd[j] = row[2 * j + 1];
  if (width % 2) even[pairs] = row[width - 1], odd[pairs] = 0;
}

template <typename T>
struct Planes {
  T* first;
  int64_t apart;  // from one plane to the next
  T* at(int i, int j) const { return first + (4 * i + j) * apart; }
};

template <typename T>
Planes<T> planes_of(const Conv3x3& p, int64_t channel, int64_t row) {
  const int64_t count = p.rows * p.columns;
  return {static_cast<T*>(p.tiles) + channel * count + row * p.columns, p.channels * count};
}

// Line y of a row of tiles' image, counted from the first of its results; `outside` where there is none.
template <typename T>
T* line_of(const Conv3x3& p, int64_t channel, int64_t row, int y, T* outside) {
  const int64_t image = (p.first_row + row) / p.image_rows;
  const int64_t line = 2 * ((p.first_row + row) % p.image_rows) + y;
  if (line < 0 || line >= p.map.height) return outside;
  return static_cast<T*>(p.map.data) + image * p.map.stride_b + channel * p.map.stride_c + line * p.map.stride_y;
}

// Writes tiles: down(line, the four lines of the map, x) makes a number of each of four lines, and across(plane, even,
// odd, j) one of each of four planes from a line's even and odd columns. One more of either, to the right and to the
// left, is outside and zero.
template <typename T, typename Down, typename Across>
void write_tiles(const Conv3x3& p, int64_t begin, int64_t end, Down down, Across across) {
  const int64_t columns = p.columns;
  Scratch<T> lines(4 * p.map.width), halves(2 * (columns + 1)), zeros(p.map.width);
  T* const line[4] = {lines, lines + p.map.width, lines + 2 * p.map.width, lines + 3 * p.map.width};
  T *const even = halves, *const odd = halves + columns + 2;
  odd[-1] = 0, even[columns] = 0;
  for (int64_t x = 0; x < p.map.width; ++x) zeros[x] = 0;
  for (int64_t channel = begin; channel < end; ++channel)
    for (int64_t row = 0; row < p.rows; ++row) {
      const T* const from[4] = {line_of<T>(p, channel, row, -1, zeros), line_of<T>(p, channel, row, 0, zeros),
                                line_of<T>(p, channel, row, 1, zeros), line_of<T>(p, channel, row, 2, zeros)};
      for (int64_t x = 0; x < p.map.width; ++x) down(line, from, x);
      const Planes<T> planes = planes_of<T>(p, channel, row);
      for (int i = 0; i < 4; ++i) {
        separate<T>(line[i], p.map.width, even, odd);
        T* const plane[4] = {planes.at(i, 0), planes.at(i, 1), planes.at(i, 2), planes.at(i, 3)};
        for (int64_t j = 0; j < columns; ++j) across(plane, even, odd, j);
      }
    }
}

template <typename T>
void tiles_of_map_as(const Conv3x3& p, int64_t begin, int64_t end) {
  write_tiles<T>(
      p, begin, end,
      [](T* const* line, const T* const* from, int64_t x) {
        line[0][x] = from[0][x] - from[2][x];
        line[1][x] = from[1][x] + from[2][x];
        line[2][x] = from[2][x] - from[1][x];
        line[3][x] = from[1][x] - from[3][x];
      },
      [](T* const* plane, const T* even, const T* odd, int64_t j) {
        plane[0][j] = odd[j - 1] - odd[j];
        plane[1][j] = even[j] + odd[j];
        plane[2][j] = odd[j] - even[j];
        plane[3][j] = even[j] - even[j + 1];
      });
}

// The transform of a result's gradient, A dy Aᵀ: the adjoint of map_of_tiles.
template <typename T>
void tiles_of_result_as(const Conv3x3& p, int64_t begin, int64_t end) {
  write_tiles<T>(
      p, begin, end,
      [](T* const* line, const T* const* from, int64_t x) {
        line[0][x] = from[1][x];
        line[1][x] = from[1][x] + from[2][x];
        line[2][x] = from[1][x] - from[2][x];
        line[3][x] = -from[2][x];
      },
      [](T* const* plane, const T* even, const T* odd, int64_t j) {
        plane[0][j] = even[j];
        plane[1][j] = even[j] + odd[j];
        plane[2][j] = even[j] - odd[j];
        plane[3][j] = -odd[j];
      });
}

template <typename T>
void map_of_tiles_as(const Conv3x3& p, int64_t begin, int64_t end) {
  const int64_t columns = p.columns, pairs = p.map.width / 2;
  Scratch<T> sums(4 * columns);
  T *const s0 = sums, *const s1 = s0 + columns, *const s2 = s1 + columns, *const s3 = s2 + columns;
  T* const sum[4] = {s0, s1, s2, s3};
  for (int64_t channel = begin; channel < end; ++channel)
    for (int64_t row = 0; row < p.rows; ++row) {
      const Planes<T> planes = planes_of<T>(p, channel, row);
      for (int side = 0; side < 2; ++side) {
        T* const to = line_of<T>(p, channel, row, side, nullptr);
        if (to == nullptr) continue;
        for (int j = 0; j < 4; ++j) {
          const T *const a = planes.at(0, j), *const b = planes.at(1, j), *const c = planes.at(2, j);
          const T* const d = planes.at(3, j);
          T* const s = sum[j];
          if (side == 0)
            for (int64_t k = 0; k < columns; ++k) s[k] = a[k] + b[k] + c[k];
          else
            for (int64_t k = 0; k < columns; ++k) s[k] = b[k] - c[k] - d[k];
        }
        for (int64_t k = 0; k < pairs; ++k) {
          const T left = s0[k] + s1[k] + s2[k], right = s1[k] - s2[k] - s3[k];
          to[2 * k] = left, to[2 * k + 1] = right;
        }
        if (p.map.width % 2) to[2 * pairs] = s0[pairs] + s1[pairs] + s2[pairs];
      }
    }
}

constexpr int64_t RUN = 64;  // inputs at a time

// G times three numbers, for runs of `count` side by side; the four results lie `apart`.
template <typename T>
void three_to_four(const T* a, const T* b, const T* d, int64_t count, T* to, int64_t apart) {
  for (int64_t i = 0; i < count; ++i) {
    const T ends = T(0.5) * (a[i] + d[i]), middle = T(0.5) * b[i];
    to[i] = a[i];
    to[apart + i] = ends + middle;
    to[2 * apart + i] = ends - middle;
    to[3 * apart + i] = d[i];
  }
}

template <typename T>
void transform_weight_as(const Conv3x3Weight& p, int64_t begin, int64_t end) {
  Scratch<T> taps(9 * RUN), rows(12 * RUN);
  const int64_t plane = p.outputs * p.inputs;
  for (int64_t o = begin; o < end; ++o)
    for (int64_t c = 0; c < p.inputs; c += RUN) {
      const int64_t count = p.inputs - c < RUN ? p.inputs - c : RUN;
      const T* const from = static_cast<const T*>(p.weight) + o * p.stride_o + 9 * c;
      for (int tap = 0; tap < 9; ++tap) {
        const int source = p.reversed ? 8 - tap : tap;
        for (int64_t i = 0; i < count; ++i) taps[tap * RUN + i] = from[9 * i + source];
      }
      for (int j = 0; j < 3; ++j)  // G g: a row of g is three runs of taps
        three_to_four<T>(taps + j * RUN, taps + (3 + j) * RUN, taps + (6 + j) * RUN, count, rows + j * RUN, 3 * RUN);
      T* const result = static_cast<T*>(p.transformed) + o * p.inputs + c;
      for (int row = 0; row < 4; ++row) {
        const T* const of_row = rows + 3 * row * RUN;
        three_to_four<T>(of_row, of_row + RUN, of_row + 2 * RUN, count, result + 4 * row * plane, plane);
      }
    }
}

}  // namespace

APC_DEFINE_WIDE_KERNEL(tiles_of_map, Conv3x3)
APC_DEFINE_WIDE_KERNEL(tiles_of_result, Conv3x3)
APC_DEFINE_WIDE_KERNEL(map_of_tiles, Conv3x3)
APC_DEFINE_WIDE_KERNEL(transform_weight, Conv3x3Weight)
