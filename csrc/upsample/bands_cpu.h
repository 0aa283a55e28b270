// The gradients of losses on upsampled logits, on the CPU.
//
// In gather form: a unit is a band of source rows of an image, and everything that reaches them. For a block of output
// rows between two source rows, and for each class, two wide rows are added up in registers, one for each source row;
// they are then collapsed to source columns, for as many classes at a time as a vector has lanes. The group of rows
// above a band is computed for both its neighbours; the bits do not depend on how an image is cut.
#pragma once

#include "rows_cpu.h"

namespace {

constexpr int64_t ROW_BLOCK = 16;     // output rows at a time
constexpr int64_t COLUMN_BLOCKS = 8;  // vectors of columns whose pixels stay in L1 while classes go by

// A Loss says what all classes of a vector of pixels share (Pixels), describes R rows of these, and returns a function
// that computes the gradient of one class of a vector. With a SOFTMAX, logits are relative to the largest of their
// source pixel, and pixels are described from the logits of all classes.
template <typename T, typename Loss>
class Band {
  using A = Acc<T>;
  using Vec = typename Pack<A>::type;
  static constexpr int W = Pack<A>::width;

  const typename Loss::Problem& p;
  const Loss loss{p};
  const int64_t stride = row_stride<A>(p);              // of a source row
  const int64_t blocks = blocks_of(p.columns.size, W);  // vectors in a row
  const int64_t width = (blocks + 1) * W;               // of a wide row
  const int64_t lanes = blocks_of(p.classes, W) * W;    // classes, padded
  const Scratch<ColumnBlock<A>> columns{blocks};
  const Scratch<int64_t> ends{p.columns.source};  // of each source column, the output columns
  const Scratch<A> own_row{p.classes * stride}, next_row{p.classes * stride}, largest{stride};
  const Scratch<Vec> interpolated{2 * p.classes};                   // both source rows, in one vector of columns
  const Scratch<typename Loss::Pixels> pixels{blocks * ROW_BLOCK};  // (blocks, rows at hand)
  const Scratch<A> own_sum{W * width}, next_sum{W * width};         // (W classes, width)
  const Scratch<A> own_turned{width * W}, next_turned{width * W};   // (width, W classes)
  const Scratch<A> gradients{2 * p.columns.source * lanes};         // two of (source columns, lanes)
  // The gradient of source row y, and what has reached that of row y + 1.
  A *current = gradients, *following = gradients + p.columns.source * lanes;
  RowWeights<A> weights[ROW_BLOCK];

 public:
  explicit Band(const typename Loss::Problem& p) : p(p) {
    for (int64_t v = 0; v < blocks; ++v) columns[v] = ColumnBlock<A>(p.columns, v * W);
    for (int64_t x = 0; x < p.columns.source; ++x) ends[x] = p.columns.first(x + 1);
    for (int64_t i = 0; i < W * width; ++i) own_sum[i] = next_sum[i] = 0;  // lanes without a class stay so
  }

  // The gradient of the source rows [top, bottom).
  void run(int64_t image, int64_t top, int64_t bottom) {
    clear(current), clear(following);
    if (top > 0) add_group(image, top - 1);
    for (int64_t y = top; y < bottom; ++y) {
      A* reached = following;
      following = current, current = reached;
      clear(following);
      add_group(image, y);
      store(image, y);
    }
  }

 private:
  void clear(A* gradient) {
    for (int64_t i = 0; i < p.columns.source * lanes; ++i) gradient[i] = 0;
  }

  // What reaches the source rows y and y + 1 from the output rows between them.
  void add_group(int64_t image, int64_t y) {
    const int64_t first = p.rows.first(y), last = p.rows.first(y + 1);
    if (first == last) return;
    const bool is_last = y + 1 == p.rows.source;
    load(image, y, own_row);
    load(image, is_last ? y : y + 1, next_row);
    for (int64_t row = first; row < last; row += ROW_BLOCK) {
      const int64_t rows = last - row < ROW_BLOCK ? last - row : ROW_BLOCK;
      for (int64_t r = 0; r < rows; ++r) weights[r] = RowWeights<A>(p.rows, row + r);
      for (int64_t v = 0; v < blocks; ++v) describe_pixels(image, row, rows, columns[v], pixels + v * rows);
      for (int64_t k = 0; k < p.classes; k += W) {
        const int64_t count = p.classes - k < W ? p.classes - k : W;
        for (int64_t v = 0; v < blocks; v += COLUMN_BLOCKS) {
          const int64_t end = v + COLUMN_BLOCKS < blocks ? v + COLUMN_BLOCKS : blocks;
          for (int64_t i = 0; i < count; ++i) sum_rows(image, k + i, i, v, end, rows);
        }
        collapse(own_sum, own_turned, current + k);
        collapse(next_sum, next_turned, (is_last ? current : following) + k);
      }
    }
  }

  void load(int64_t image, int64_t y, A* to) const {
    if constexpr (Loss::SOFTMAX)
      load_relative_row<T>(p, image, y, to, largest);
    else
      load_row<T>(p, image, y, to);
  }

  void describe_pixels(int64_t image, int64_t row, int64_t rows, const ColumnBlock<A>& block,
                       typename Loss::Pixels* to) const {
    for (int64_t k = 0; Loss::SOFTMAX && k < p.classes; ++k) {
      interpolated[2 * k] = block.of(own_row + k * stride);
      interpolated[2 * k + 1] = block.of(next_row + k * stride);
    }
    for_each_rows(0, rows, [&]<int R>(int64_t r) {
      loss.template describe<R>(image, row + r, weights + r, block, interpolated, to + r);
    });
  }

  // Adds up the rows at hand for one class, in the columns of the vectors [v, end).
  void sum_rows(int64_t image, int64_t k, int64_t lane, int64_t v, int64_t end, int64_t rows) const {
    const auto gradient_of = loss.gradient_of(image, k);
    for (; v < end; ++v) {
      const Vec above = columns[v].of(own_row + k * stride), below = columns[v].of(next_row + k * stride);
      const typename Loss::Pixels* pixel = pixels + v * rows;
      Vec own{}, next{};
      for (int64_t r = 0; r < rows; ++r, ++pixel) {
        const Vec gradient = gradient_of(weights[r].own * above + weights[r].next * below, *pixel);
        own += weights[r].own * gradient;
        next += weights[r].next * gradient;
      }
      store_lanes<A>(own_sum + lane * width + v * W, own);
      store_lanes<A>(next_sum + lane * width + v * W, next);
    }
  }

  // Adds wide rows of W classes, weighted, to W lanes of the gradient.
  void collapse(const A* sum, A* turned, A* gradient) const {
    transpose<A>(sum, width, W, blocks * W, turned, W);
    for (int64_t x = 0, column = 0; x < p.columns.source; ++x) {
      Vec own{}, next{};
      for (; column < ends[x]; ++column) {
        const ColumnBlock<A>& block = columns[column / W];
        const Vec values = load_lanes<A>(turned + column * W);
        own += block.own_weight[column % W] * values;
        next += block.next_weight[column % W] * values;
      }
      A* to = gradient + x * lanes;
      A* after = x + 1 < p.columns.source ? to + lanes : to;
      store_lanes<A>(to, load_lanes<A>(to) + own);
      store_lanes<A>(after, load_lanes<A>(after) + next);
    }
  }

  void store(int64_t image, int64_t y) const {
    const Map& g = p.grad_logits;
    T* to = static_cast<T*>(g.data) + image * g.stride_b + y * g.stride_y;
    if (g.stride_x == 1) return transpose<A>(current, lanes, p.columns.source, p.classes, to, g.stride_c);
    for (int64_t x = 0; x < p.columns.source; ++x)
      for (int64_t k = 0; k < p.classes; ++k) to[x * g.stride_x + k * g.stride_c] = round_to<T>(current[x * lanes + k]);
  }
};

// The bands [begin, end) of all images.
template <typename T, typename Loss>
void run_bands(const typename Loss::Problem& p, int64_t begin, int64_t end) {
  Band<T, Loss> band(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t rows = p.rows.source, cut = unit % p.bands;
    band.run(unit / p.bands, cut * rows / p.bands, (cut + 1) * rows / p.bands);
  }
}

}  // namespace
