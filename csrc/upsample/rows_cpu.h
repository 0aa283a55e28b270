// Source rows on the CPU: as (classes x row) arrays in the accumulator's type, and interpolated along the row.
#pragma once

#include "../common/lanes_cpu.h"
#include "upsample.h"

namespace {

inline int64_t blocks_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// One vector of output columns: where it reads a source row, and with what weights. Lanes past the end repeat the last
// column.
template <typename A>
struct ColumnBlock {
  static constexpr int W = Pack<A>::width;
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;

  int64_t first;   // output column
  int64_t base;    // source column
  int64_t valid;   // lanes
  bool in_vector;  // whether all that it reads lies in the vector at `base`
  Int own, next;   // lanes of that vector
  Vec own_weight, next_weight;

  ColumnBlock(const Axis& axis, int64_t first)
      : first(first), base(axis.at(first).index), valid(axis.size - first < W ? axis.size - first : W) {
    for (int i = 0; i < W; ++i) {
      const Position p = axis.at(i < valid ? first + i : axis.size - 1);
      own[i] = static_cast<typename Integers<A>::scalar>(p.index - base);
      next[i] = static_cast<typename Integers<A>::scalar>(p.next - base);
      next_weight[i] = static_cast<A>(p.rest) / static_cast<A>(axis.denominator);
      own_weight[i] = 1 - next_weight[i];
    }
    in_vector = next[W - 1] < W;
  }

  // A source row, readable one vector past its end, at these columns.
  Vec of(const A* row) const {
    row += base;
    if (in_vector) {
      const Vec values = load_lanes<A>(row);
      return permute<A>(values, own) * own_weight + permute<A>(values, next) * next_weight;
    }
    Vec at_own, at_next;
    for (int i = 0; i < W; ++i) at_own[i] = row[own[i]], at_next[i] = row[next[i]];
    return at_own * own_weight + at_next * next_weight;
  }
};

// The weights of a row of the output. They add up to 1, rounded though they are: what all logits have in common stays
// what it is.
template <typename A>
struct RowWeights {
  A own, next;
  RowWeights() = default;
  RowWeights(const Axis& axis, int64_t row) {
    const int64_t rest = axis.at(row).rest;
    next = static_cast<A>(rest) / static_cast<A>(axis.denominator);
    own = 1 - next;
  }
};

template <typename A>
inline int64_t row_stride(const Upsample& u) {
  return u.columns.source + Pack<A>::width;
}

// to (classes x row_stride) = source row y of an image; the end of each row is filled up with zeros.
template <typename T>
void load_row(const Upsample& u, int64_t image, int64_t y, Acc<T>* __restrict to) {
  using A = Acc<T>;
  const int64_t width = u.columns.source, stride = row_stride<A>(u);
  const T* from = static_cast<const T*>(u.logits.data) + image * u.logits.stride_b + y * u.logits.stride_y;
  if (u.logits.stride_c == 1 && u.logits.stride_x != 1) {
    transpose<A>(from, u.logits.stride_x, width, u.classes, to, stride);
  } else {
    for (int64_t k = 0; k < u.classes; ++k)
      for (int64_t x = 0; x < width; ++x)
        to[k * stride + x] = load(from[k * u.logits.stride_c + x * u.logits.stride_x]);
  }
  for (int64_t k = 0; k < u.classes; ++k)
    for (int64_t x = width; x < stride; ++x) to[k * stride + x] = 0;
}

// The same, relative to each source pixel's largest logit. Probabilities do not change, for interpolation is linear;
// what all logits have in common, which rounding would be measured by, is gone.
template <typename T>
void load_relative_row(const Upsample& u, int64_t image, int64_t y, Acc<T>* __restrict to, Acc<T>* __restrict largest) {
  load_row<T>(u, image, y, to);
  const int64_t width = u.columns.source, stride = row_stride<Acc<T>>(u);
  for (int64_t x = 0; x < width; ++x) largest[x] = to[x];
  for (int64_t k = 1; k < u.classes; ++k)
    for (int64_t x = 0; x < width; ++x) largest[x] = to[k * stride + x] > largest[x] ? to[k * stride + x] : largest[x];
  for (int64_t k = 0; k < u.classes; ++k)
    for (int64_t x = 0; x < width; ++x) to[k * stride + x] -= largest[x];
}

// Calls run.operator()<R>(row) for R rows at a time, as many as registers hold.
template <int R = ROWS, typename Run>
inline void for_each_rows(int64_t first, int64_t last, Run run) {
  for (; first + R <= last; first += R) run.template operator()<R>(first);
  if constexpr (R > 1) for_each_rows<R / 2>(first, last, run);
}

template <typename A, int R>
struct Best {
  typename Pack<A>::type value[R];
  typename Integers<A>::type index[R];
};

// The largest logit, and the first class that has it. `of_class(i)` is the i-th class to look at, in ascending order.
template <typename A, int R, typename OfClass>
inline Best<A, R> best_class(const typename Pack<A>::type* interpolated, int64_t count, const RowWeights<A>* weights,
                             OfClass of_class) {
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  Best<A, R> best;
  const Int first = Int{} + static_cast<typename Integers<A>::scalar>(of_class(0));
  for (int r = 0; r < R; ++r)
    best.value[r] = weights[r].own * interpolated[0] + weights[r].next * interpolated[1], best.index[r] = first;
  for (int64_t i = 1; i < count; ++i) {
    const Vec own = interpolated[2 * i], next = interpolated[2 * i + 1];
    const Int label = Int{} + static_cast<typename Integers<A>::scalar>(of_class(i));
    for (int r = 0; r < R; ++r) {
      const Vec logit = weights[r].own * own + weights[r].next * next;
      best.index[r] = logit > best.value[r] ? label : best.index[r];
      best.value[r] = logit > best.value[r] ? logit : best.value[r];
    }
  }
  return best;
}

template <typename A, int R>
inline Best<A, R> best_class(const typename Pack<A>::type* interpolated, int64_t classes,
                             const RowWeights<A>* weights) {
  return best_class<A, R>(interpolated, classes, weights, [](int64_t k) { return k; });
}

// The weights of classes, 1 where none are given; returns their sum.
template <typename A>
inline A weights_of_classes(const CrossEntropy& p, A* of_class) {
  const A* weight = static_cast<const A*>(p.weight);
  A sum = 0;
  for (int64_t k = 0; k < p.classes; ++k) sum += of_class[k] = weight == nullptr ? 1 : weight[k];
  return sum;
}

// Focal loss (1 - p)^gamma * -log p, where p = own / (own + others) is the probability of a pixel's label.
template <typename A>
struct Focal {
  using Vec = typename Pack<A>::type;
  Vec sum;   // own + others
  Vec rest;  // 1 - p
  Vec loss;
  Vec gradient;  // of the loss, as a multiple of that of -log p

  // Of the largest logit minus the label's, and the sum of exp(logit - largest) over the other classes.
  Focal(Vec gap, Vec others, A gamma) {
    const Vec own = exp_lanes(-gap);
    sum = own + others, rest = others / sum;
    const Vec p = own / sum;
    // -log p / (1 - p): near p = 1 by its series, for the logarithm there is a rounding error.
    constexpr A small = std::is_same_v<A, float> ? 0x1p-4 : 0x1p-9;
    Vec ratio = rest * A(1. / 6) + A(1. / 5);
    for (const A term : {A(1. / 4), A(1. / 3), A(1. / 2), A(1)}) ratio = ratio * rest + term;
    ratio = rest < small ? ratio : (gap + log_lanes(sum)) / rest;
    const Vec power = rest == 0 ? Vec{} : exp_lanes(gamma * log_lanes(rest));
    loss = power * (rest * ratio);
    gradient = power * (1 + gamma * (p == 0 ? Vec{} : p * ratio));
  }
};

constexpr int32_t IGNORED = -1, OUT_OF_RANGE = -2;

// IGNORED or OUT_OF_RANGE where a label is no class.
template <typename Int, typename Wide>
inline Int classes_of(Int label, Wide classes, Wide ignored, bool any_ignored) {
  const Int kept = (label >= 0) & (label < classes) ? label : Int{} + OUT_OF_RANGE;
  return any_ignored & (label == ignored) ? Int{} + IGNORED : kept;
}

template <typename A, typename L>
inline typename Integers<A>::type labels_at(const L* from, int64_t classes, int64_t ignored) {
  using Int = typename Integers<A>::type;
  using Wide = typename Integers<A>::scalar;
  constexpr int W = Pack<A>::width;
  if constexpr (sizeof(L) <= sizeof(Wide)) {
    typedef L Raw __attribute__((vector_size(W * sizeof(L)), aligned(alignof(L)), may_alias));
    const Int label = __builtin_convertvector(*reinterpret_cast<const Raw*>(from), Int);
    const Wide none = static_cast<Wide>(ignored);
    return classes_of<Int, Wide>(label, static_cast<Wide>(classes), none, none == ignored);
  } else {  // int64 beside floats: two vectors
    typedef int32_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
    using Long = typename Integers<double>::type;
    const auto half = [&](const L* at) {
      const Long label = *reinterpret_cast<const Long*>(at);
      return __builtin_convertvector(classes_of<Long, int64_t>(label, classes, ignored, true), Half);
    };
    const Half halves[2] = {half(from), half(from + W / 2)};
    return *reinterpret_cast<const Int*>(halves);
  }
}

// visit(the labels, in their own type)
template <typename Visit>
inline auto with_labels(const Labels& labels, Visit visit) {
  switch (labels.type) {
    case LabelType::uint8: return visit(static_cast<uint8_t*>(labels.data));
    case LabelType::int16: return visit(static_cast<int16_t*>(labels.data));
    case LabelType::int32: return visit(static_cast<int32_t*>(labels.data));
    case LabelType::int64: return visit(static_cast<int64_t*>(labels.data));
  }
  __builtin_unreachable();
}

// The labels from `offset` on, IGNORED or OUT_OF_RANGE where they are no class; IGNORED past the first `count`.
template <typename A>
inline typename Integers<A>::type read_labels(const Labels& labels, int64_t offset, int64_t count, int64_t classes,
                                              int64_t ignored) {
  return with_labels(labels, [&]<typename L>(const L* from) {
    constexpr int W = Pack<A>::width;
    from += offset;
    if (count == W) return labels_at<A, L>(from, classes, ignored);
    L padded[W] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
    typename Integers<A>::type label = labels_at<A, L>(padded, classes, ignored);
    for (int64_t i = count; i < W; ++i) label[i] = IGNORED;
    return label;
  });
}

// The logits and the weights of pixels' labels; of class 0 where there is none.
template <typename A>
struct AtLabels {
  typename Pack<A>::type logit, weight;

  AtLabels(typename Integers<A>::type label, const typename Pack<A>::type* interpolated, const RowWeights<A>& row,
           const A* of_class) {
    constexpr int W = Pack<A>::width;
    typename Integers<A>::scalar labels[W];
    store_lanes<typename Integers<A>::scalar>(labels, label);
    A own[W], next[W], weights[W];
    for (int i = 0; i < W; ++i) {
      const int64_t inside = labels[i] < 0 ? 0 : labels[i];
      const A* pair = reinterpret_cast<const A*>(interpolated + 2 * inside) + i;
      own[i] = pair[0], next[i] = pair[W], weights[i] = of_class[inside];
    }
    logit = row.own * load_lanes<A>(own) + row.next * load_lanes<A>(next);
    weight = load_lanes<A>(weights);
  }
};

}  // namespace
