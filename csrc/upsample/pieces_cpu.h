// Forward work on the CPU: groups of output rows, and vectors of their columns.
#pragma once

#include "rows_cpu.h"

namespace {

// The output rows between two source rows of an image, and what they are interpolated from.
template <typename A>
struct Group {
  int64_t unit, image, first_row, last_row, stride;
  const A *own, *next;  // both source rows, (classes x stride)
};

// One vector of output columns, in all rows of a group.
template <typename A>
struct Piece : Group<A> {
  const ColumnBlock<A>& columns;
  const typename Pack<A>::type* interpolated;  // (classes, 2): both source rows, interpolated

  // Of the pixel in this row at the vector's first lane, counted through the batch.
  int64_t pixel(const Upsample& u, int64_t row) const {
    return (this->image * u.rows.size + row) * u.columns.size + columns.first;
  }
};

// Calls visit(group) for the groups [begin, end), with logits as they are or relative to the largest.
template <typename T, bool RELATIVE, typename Visit>
inline void for_each_group(const Upsample& u, int64_t begin, int64_t end, Visit visit) {
  using A = Acc<T>;
  const int64_t stride = row_stride<A>(u);
  Scratch<A> rows(2 * u.classes * stride), largest(stride);
  A *own = rows, *next = rows + u.classes * stride;
  int64_t loaded = -1;  // the unit whose own row `next` is
  const auto load = [&](int64_t image, int64_t y, A* to) {
    if constexpr (RELATIVE)
      load_relative_row<T>(u, image, y, to, largest);
    else
      load_row<T>(u, image, y, to);
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / u.rows.source, y = unit % u.rows.source;
    const int64_t first = u.rows.first(y), last = u.rows.first(y + 1);
    if (first == last) continue;
    if (unit == loaded) {
      A* const before = own;
      own = next, next = before;
    } else {
      load(image, y, own);
    }
    const bool is_last = y + 1 == u.rows.source;
    if (!is_last) load(image, y + 1, next), loaded = unit + 1;
    visit(Group<A>{unit, image, first, last, stride, own, is_last ? own : next});
  }
}

template <typename A>
struct ColumnBlocks {
  const int64_t count;
  const Scratch<ColumnBlock<A>> blocks{count};
  explicit ColumnBlocks(const Axis& axis) : count(blocks_of(axis.size, Pack<A>::width)) {
    for (int64_t v = 0; v < count; ++v) blocks[v] = ColumnBlock<A>(axis, v * Pack<A>::width);
  }
  const ColumnBlock<A>* begin() const { return blocks; }
  const ColumnBlock<A>* end() const { return blocks + count; }
};

// Calls visit(piece) for every vector of the groups [begin, end), with logits as they are or relative to the largest.
template <typename T, bool RELATIVE, typename Visit>
inline void for_each_piece(const Upsample& u, int64_t begin, int64_t end, Visit visit) {
  using A = Acc<T>;
  const ColumnBlocks<A> blocks(u.columns);
  Scratch<typename Pack<A>::type> interpolated(2 * u.classes);
  for_each_group<T, RELATIVE>(u, begin, end, [&](const Group<A>& group) {
    for (const ColumnBlock<A>& block : blocks) {
      for (int64_t k = 0; k < u.classes; ++k) {
        interpolated[2 * k] = block.of(group.own + k * group.stride);
        interpolated[2 * k + 1] = block.of(group.next + k * group.stride);
      }
      visit(Piece<A>{group, block, interpolated});
    }
  });
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
