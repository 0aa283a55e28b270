// Classes that can have the largest logit at output pixels, found on the source pixels around them.
//
// An interpolated logit lies between the smallest and the largest logit of its source pixels. A class whose largest
// logit lies below another class's smallest one cannot win anywhere between them, and is not interpolated. The bounds
// are widened by more than rounding can do, so the labels are those of a search of all classes, bit by bit.
#pragma once

#include "rows_cpu.h"

namespace {

// Classes in ascending order.
struct Classes {
  const int32_t* list;
  int64_t count;
};

template <typename A>
class Candidates {
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  static constexpr int W = Pack<A>::width;
  static constexpr bool SINGLE = std::is_same_v<A, float>;
  // An interpolated logit is a sum of four products: eight roundings, each of half a unit at most, and below the
  // smallest normal number no more than that.
  static constexpr A MARGIN = SINGLE ? 0x1p-20 : 0x1p-49, LEAST = SINGLE ? 0x1p-126 : 0x1p-1022;
  static constexpr A INFINITE = static_cast<A>(__builtin_inf());
  static constexpr int64_t LONGEST_PAUSE = 15;  // groups

  struct Turned {
    A* logits;    // a source row, (columns x stride)
    bool finite;  // whether all are
  };

  const int64_t classes, columns, row;  // row: of (classes x row), as load_row fills it
  const bool pays;                      // where source columns are fewer than output columns
  const int64_t stride = blocks_of(classes, W) * W;
  const Scratch<A> rows{2 * columns * stride}, highest{stride};
  const Scratch<int32_t> every{classes}, some{stride};
  Turned own{rows, false}, next{rows + columns * stride, false};
  int64_t turned = -1;              // the unit whose own row `next` is
  int64_t pause = 0, skip = 0;      // groups to leave alone after one in which few classes were excluded
  int64_t looked_at = 0, kept = 0;  // classes in the group before
  bool search = false, one_row = false;

 public:
  explicit Candidates(const Upsample& u)
      : classes(u.classes), columns(u.columns.source), row(row_stride<A>(u)), pays(4 * columns <= 3 * u.columns.size) {
    for (int64_t k = 0; k < classes; ++k) every[k] = static_cast<int32_t>(k);
    for (int64_t x = 0; x < 2 * columns; ++x)  // classes that are not there cannot win
      for (int64_t k = classes; k < stride; ++k) rows[x * stride + k] = -INFINITE;
  }

  // Goes on to a group, between these two rows.
  void enter(int64_t unit, const A* own_row, const A* next_row) {
    if (search) {
      const bool paid = looked_at > 0 && 4 * kept <= 3 * looked_at;
      pause = paid ? 0 : pause < LONGEST_PAUSE ? 2 * pause + 1 : pause;
      skip = pause;
    }
    looked_at = kept = 0;
    search = pays && skip == 0;
    if (!search) return void(skip -= skip > 0);
    if (unit == turned) {
      const Turned before = own;
      own = next, next = before;
    } else {
      turn(own_row, own);
    }
    one_row = own_row == next_row;
    if (!one_row) turn(next_row, next), turned = unit + 1;
  }

  // The classes that can win at these columns: all of them where no search would pay, or a logit is not finite.
  Classes of(const ColumnBlock<A>& block) {
    if (!search || !block.in_vector || !own.finite || !(one_row || next.finite)) return {every, classes};
    const A* const upper = own.logits + block.base * stride;
    const A* const lower = (one_row ? own : next).logits + block.base * stride;
    Vec thresholds = Vec{} - INFINITE;
    for (int64_t k = 0; k < stride; k += W) {
      Vec least = load_lanes<A>(upper + k), most = least;
      for (int64_t x = 0; x <= block.next[W - 1]; ++x) {
        const Vec a = load_lanes<A>(upper + x * stride + k), b = load_lanes<A>(lower + x * stride + k);
        least = a < least ? a : least, most = a > most ? a : most;
        least = b < least ? b : least, most = b > most ? b : most;
      }
      const Vec size = -least > most ? -least : most;
      const Vec margin = size * MARGIN + LEAST;
      thresholds = least - margin > thresholds ? least - margin : thresholds;
      store_lanes<A>(highest + k, most + margin);
    }
    A threshold = thresholds[0];
    for (int i = 1; i < W; ++i) threshold = thresholds[i] > threshold ? thresholds[i] : threshold;
    int64_t count = 0;
    for (int64_t k = 0; k < stride; k += W) {
      const Int can = load_lanes<A>(highest + k) >= threshold;
      if (!any(can)) continue;
      for (int i = 0; i < W; ++i) some[count] = static_cast<int32_t>(k + i), count += can[i] & 1;
    }
    looked_at += classes, kept += count;
    return {some, count};
  }

 private:
  void turn(const A* from, Turned& to) const {
    transpose<A>(from, row, classes, columns, to.logits, stride);
    Vec zeros{};
    for (int64_t i = 0; i + W <= classes * row; i += W) zeros += load_lanes<A>(from + i) * 0;
    for (int64_t i = classes * row / W * W; i < classes * row; ++i) zeros[0] += from[i] * 0;
    to.finite = !any(zeros != Vec{});
  }

  static bool any(Int lanes) {
    uint64_t words[VECTOR_BYTES / 8], together = 0;
    std::memcpy(words, &lanes, sizeof words);
    for (uint64_t word : words) together |= word;
    return together != 0;
  }
};

}  // namespace
