// Forward work on the CPU: vectors of output columns, in the rows of a group of output rows.
#pragma once

#include "rows_cpu.h"

namespace {

// One vector of output columns, in all rows of a group.
template <typename A>
struct Piece {
  int64_t unit, image, first_row, last_row;
  const ColumnBlock<A>& columns;
  const typename Pack<A>::type* interpolated;  // (classes, 2): both source rows, interpolated

  // Of the pixel in this row at the vector's first lane, counted through the batch.
  int64_t pixel(const Upsample& u, int64_t row) const {
    return (image * u.rows.size + row) * u.columns.size + columns.first;
  }
};

// Calls visit(piece) for every vector of the groups [begin, end), with logits as they are or relative to the largest.
template <typename T, bool RELATIVE, typename Visit>
inline void for_each_piece(const Upsample& u, int64_t begin, int64_t end, Visit visit) {
  using A = Acc<T>;
  const int64_t count = blocks_of(u.columns.size, Pack<A>::width), stride = row_stride<A>(u);
  Scratch<ColumnBlock<A>> blocks(count);
  for (int64_t v = 0; v < count; ++v) blocks[v] = ColumnBlock<A>(u.columns, v * Pack<A>::width);
  Scratch<A> own(u.classes * stride), next(u.classes * stride), largest(stride);
  const auto load = [&](int64_t image, int64_t y, A* to) {
    if constexpr (RELATIVE)
      load_relative_row<T>(u, image, y, to, largest);
    else
      load_row<T>(u, image, y, to);
  };
  Scratch<typename Pack<A>::type> interpolated(2 * u.classes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / u.rows.source, y = unit % u.rows.source;
    const int64_t first = u.rows.first(y), last = u.rows.first(y + 1);
    if (first == last) continue;
    load(image, y, own);
    load(image, y + 1 < u.rows.source ? y + 1 : y, next);
    for (int64_t v = 0; v < count; ++v) {
      for (int64_t k = 0; k < u.classes; ++k) {
        interpolated[2 * k] = blocks[v].of(own + k * stride);
        interpolated[2 * k + 1] = blocks[v].of(next + k * stride);
      }
      visit(Piece<A>{unit, image, first, last, blocks[v], interpolated});
    }
  }
}

// R rows of a piece, as many as registers hold: their weights and the classes of their largest logits.
template <typename A, int R>
struct Rows {
  const Piece<A>& piece;
  int64_t first;
  RowWeights<A> weights[R];
  Best<A, R> best;

  Rows(const Upsample& u, const Piece<A>& piece, int64_t first) : piece(piece), first(first) {
    for (int r = 0; r < R; ++r) weights[r] = RowWeights<A>(u.rows, first + r);
    best = best_class<A, R>(piece.interpolated, u.classes, weights);
  }
};

// Calls visit(rows) for all rows of the groups [begin, end), with logits as they are or relative to the largest.
template <typename T, bool RELATIVE, typename Visit>
inline void for_each_best(const Upsample& u, int64_t begin, int64_t end, Visit visit) {
  using A = Acc<T>;
  for_each_piece<T, RELATIVE>(u, begin, end, [&](const Piece<A>& piece) {
    for_each_rows(piece.first_row, piece.last_row, [&]<int R>(int64_t row) { visit(Rows<A, R>(u, piece, row)); });
  });
}

}  // namespace
