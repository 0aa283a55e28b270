// upsample_*'s forward CPU kernels, compiled once for each instruction set.
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

// sums = the sum of exp(logit - best); where SMOOTH, linear = that of of_class * (logit - best).
template <typename A, int R, bool SMOOTH>
inline void sum_exponentials(const typename Pack<A>::type* interpolated, int64_t classes, const RowWeights<A>* weights,
                             const typename Pack<A>::type* best, const A* of_class, typename Pack<A>::type* sums,
                             typename Pack<A>::type* linear) {
  using Vec = typename Pack<A>::type;
  for (int r = 0; r < R; ++r) sums[r] = linear[r] = Vec{};
  for (int64_t k = 0; k < classes; ++k) {
    const Vec own = interpolated[2 * k], next = interpolated[2 * k + 1];
    for (int r = 0; r < R; ++r) {
      const Vec below = weights[r].own * own + weights[r].next * next - best[r];
      sums[r] += exp_lanes(below);
      if constexpr (SMOOTH) linear[r] += of_class[k] * below;
    }
  }
}

template <typename T, bool SMOOTH>
void cross_entropy_groups_of(const CrossEntropy& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  constexpr int W = Pack<A>::width;
  const Upsample& u = p;
  const A* weight = static_cast<const A*>(p.weight);
  const A hard = static_cast<A>(1 - p.label_smoothing), soft = static_cast<A>(p.label_smoothing / u.classes);
  Scratch<A> of_class(u.classes);
  A all_classes = 0;
  for (int64_t k = 0; k < u.classes; ++k) all_classes += of_class[k] = weight == nullptr ? 1 : weight[k];
  for_each_piece<T, true>(u, begin, end, [&](const Piece<A>& piece) {
    double* totals = p.sums + 4 * piece.unit;
    for_each_rows(piece.first_row, piece.last_row, [&]<int R>(int64_t row) {
      RowWeights<A> weights[R];
      weigh_rows<A, R>(u.rows, row, weights);
      const Best<A, R> best = best_class<A, R>(piece.interpolated, u.classes, weights);
      Vec sums[R], linear[R];
      sum_exponentials<A, R, SMOOTH>(piece.interpolated, u.classes, weights, best.value, of_class, sums, linear);
      Vec loss_sum{}, weight_sum{};
      Int correct_sum{}, wrong_sum{};
      for (int r = 0; r < R; ++r) {
        const int64_t pixel = piece.pixel(u, row + r);
        const Int label = read_labels<A>(p.target, pixel, piece.columns.valid, u.classes, p.ignore_index);
        typename Integers<A>::scalar labels[W];
        store_integers<A>(labels, label);
        A at_own[W], at_next[W], weight_of[W];
        for (int i = 0; i < W; ++i) {
          const int64_t inside = labels[i] < 0 ? 0 : labels[i];
          const A* pair = reinterpret_cast<const A*>(piece.interpolated + 2 * inside) + i;
          at_own[i] = pair[0], at_next[i] = pair[W], weight_of[i] = of_class[inside];
        }
        const Vec own = load_lanes<A>(at_own), next = load_lanes<A>(at_next), of_label = load_lanes<A>(weight_of);
        const Vec logit = weights[r].own * own + weights[r].next * next, total = log_lanes(sums[r]);
        store_lanes<A>(static_cast<A*>(p.normalizer) + pixel, sums[r], piece.columns.valid);
        const Vec plain = (best.index[r] == label ? Vec{} : best.value[r] - logit) + total;  // 0 to the last bit
        Vec loss = hard * of_label * plain;
        if constexpr (SMOOTH) loss += soft * (all_classes * total - linear[r]);
        const Int counts = label >= 0;
        loss = counts ? loss : Vec{};
        loss_sum += loss, weight_sum += counts ? of_label : Vec{};
        correct_sum -= best.index[r] == label, wrong_sum -= label == OUT_OF_RANGE;
        if (p.losses != nullptr) store_lanes<A>(static_cast<A*>(p.losses) + pixel, loss, piece.columns.valid);
      }
      for (int i = 0; i < W; ++i) {
        totals[0] += loss_sum[i], totals[1] += weight_sum[i];
        totals[2] += correct_sum[i], totals[3] += wrong_sum[i];
      }
    });
  });
}

template <typename T>
void cross_entropy_groups_as(const CrossEntropy& p, int64_t begin, int64_t end) {
  if (p.label_smoothing == 0)
    cross_entropy_groups_of<T, false>(p, begin, end);
  else
    cross_entropy_groups_of<T, true>(p, begin, end);
}

// Calls store(pixel, count, labels) with the best classes of every row of every vector.
template <typename T, typename Store>
inline void for_each_best(const Upsample& u, int64_t begin, int64_t end, Store store) {
  using A = Acc<T>;
  for_each_piece<T, false>(u, begin, end, [&](const Piece<A>& piece) {
    for_each_rows(piece.first_row, piece.last_row, [&]<int R>(int64_t row) {
      RowWeights<A> weights[R];
      weigh_rows<A, R>(u.rows, row, weights);
      const Best<A, R> best = best_class<A, R>(piece.interpolated, u.classes, weights);
      for (int r = 0; r < R; ++r) {
        store(piece.pixel(u, row + r), piece.columns.valid, best.index[r]);
      }
    });
  });
}

template <typename T>
void argmax_groups_as(const Argmax& p, int64_t begin, int64_t end) {
  for_each_best<T>(p, begin, end, [&](int64_t pixel, int64_t count, typename Integers<Acc<T>>::type best) {
    with_labels(p.labels, [&]<typename L>(L* labels) {
      for (int64_t i = 0; i < count; ++i) labels[pixel + i] = static_cast<L>(best[i]);
    });
  });
}

template <typename T>
void confusion_groups_as(const Confusion& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Int = typename Integers<A>::type;
  constexpr int W = Pack<A>::width;
  const int32_t classes = static_cast<int32_t>(p.classes), cells = classes * classes;
  // A thread counts by itself, unless its matrix would be large: then it adds pixel by pixel. Integers: any order gives
  // the same sums.
  const bool alone = cells <= 1 << 20;
  Scratch<int64_t> counts(alone ? int64_t(cells) + 2
                                : 0);  // the last two: pixels that are ignored, labels out of range
  for (int32_t i = 0; alone && i < cells + 2; ++i) counts[i] = 0;
  for_each_best<T>(p, begin, end, [&](int64_t pixel, int64_t count, Int best) {
    const Int label = read_labels<A>(p.target, pixel, count, classes, p.ignore_index);
    typename Integers<A>::scalar cell[W], others = 0;
    store_integers<A>(cell, label >= 0 ? label * classes + best : cells - (label == OUT_OF_RANGE));
    if (!alone) {
      for (int i = 0; i < W; ++i)
        if (cell[i] != cells) __atomic_fetch_add(cell[i] < cells ? p.counts + cell[i] : p.invalid, 1, __ATOMIC_RELAXED);
      return;
    }
    if (cell[0] == cell[W - 1])
      for (int i = 1; i < W; ++i) others |= cell[i] ^ cell[0];
    if (cell[0] == cell[W - 1] && others == 0) {  // as inside an object: not W additions that wait for each other
      counts[cell[0]] += W;
    } else {
      for (int i = 0; i < W; ++i) ++counts[cell[i]];
    }
  });
  if (!alone) return;
  for (int32_t i = 0; i < cells; ++i)
    if (counts[i] > 0) __atomic_fetch_add(p.counts + i, counts[i], __ATOMIC_RELAXED);
  __atomic_fetch_add(p.invalid, counts[cells + 1], __ATOMIC_RELAXED);
}

template <typename T>
void softmax_groups_as(const Softmax& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Vec = typename Pack<A>::type;
  constexpr int W = Pack<A>::width;
  const Upsample& u = p;
  Scratch<Vec> exponentials(u.classes);
  for_each_piece<T, true>(u, begin, end, [&](const Piece<A>& piece) {
    const int64_t x = p.flip ? u.columns.size - 1 - piece.columns.first : piece.columns.first;
    const int64_t step = p.flip ? -p.out.stride_x : p.out.stride_x;
    for_each_rows(piece.first_row, piece.last_row, [&]<int R>(int64_t row) {
      RowWeights<A> weights[R];
      weigh_rows<A, R>(u.rows, row, weights);
      const Best<A, R> best = best_class<A, R>(piece.interpolated, u.classes, weights);
      for (int r = 0; r < R; ++r) {
        Vec sum{};
        for (int64_t k = 0; k < u.classes; ++k) {
          const Vec logit =
              weights[r].own * piece.interpolated[2 * k] + weights[r].next * piece.interpolated[2 * k + 1];
          sum += exponentials[k] = exp_lanes(logit - best.value[r]);
        }
        const Vec inverse = 1 / sum;
        A* out = static_cast<A*>(p.out.data) + piece.image * p.out.stride_b + (row + r) * p.out.stride_y +
                 x * p.out.stride_x;
        for (int64_t k = 0; k < u.classes; ++k, out += p.out.stride_c) {
          const Vec probability = exponentials[k] * inverse;
          if (step == 1 && piece.columns.valid == W) {
            store_lanes<A>(out, p.add ? load_lanes<A>(out) + probability : probability);
          } else {
            for (int64_t i = 0; i < piece.columns.valid; ++i)
              out[i * step] = p.add ? out[i * step] + probability[i] : probability[i];
          }
        }
      }
    });
  });
}

}  // namespace

APC_DEFINE_KERNEL(cross_entropy_groups, CrossEntropy)
APC_DEFINE_KERNEL(argmax_groups, Argmax)
APC_DEFINE_KERNEL(confusion_groups, Confusion)
APC_DEFINE_KERNEL(softmax_groups, Softmax)
