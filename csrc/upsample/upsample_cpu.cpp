// upsample_*'s forward CPU kernels, compiled once for each instruction set.
#include "candidates_cpu.h"
#include "pieces_cpu.h"

namespace {

// sums = the sum of exp(logit - best), with focal without the labels' own; with smoothing, linear = that of
// of_class * (logit - best).
template <Form FORM, typename A, int R>
inline void sum_exponentials(const Rows<A, R>& rows, int64_t classes, const A* of_class,
                             const typename Integers<A>::type* labels, typename Pack<A>::type* sums,
                             typename Pack<A>::type* linear) {
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  for (int r = 0; r < R; ++r) sums[r] = linear[r] = Vec{};
  for (int64_t k = 0; k < classes; ++k) {
    const Vec own = rows.piece.interpolated[2 * k], next = rows.piece.interpolated[2 * k + 1];
    for (int r = 0; r < R; ++r) {
      const Vec below = rows.weights[r].own * own + rows.weights[r].next * next - rows.best.value[r];
      if constexpr (FORM == Form::focal)
        sums[r] += labels[r] == Int{} + static_cast<typename Integers<A>::scalar>(k) ? Vec{} : exp_lanes(below);
      else
        sums[r] += exp_lanes(below);
      if constexpr (FORM == Form::smooth) linear[r] += of_class[k] * below;
    }
  }
}

template <typename T, Form FORM>
void cross_entropy_groups_of(const CrossEntropy& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  const A hard = static_cast<A>(1 - p.label_smoothing), soft = static_cast<A>(p.label_smoothing / p.classes);
  const A gamma = static_cast<A>(p.focal);
  Scratch<A> of_class(p.classes);
  const A all_classes = weights_of_classes<A>(p, of_class);
  for_each_best<T, true>(p, begin, end, [&]<int R>(const Rows<A, R>& rows) {
    const Piece<A>& piece = rows.piece;
    Vec sums[R], linear[R];
    Int labels[R];
    for (int r = 0; r < R; ++r)
      labels[r] =
          read_labels<A>(p.target, piece.pixel(p, rows.first + r), piece.columns.valid, p.classes, p.ignore_index);
    sum_exponentials<FORM, A, R>(rows, p.classes, of_class, labels, sums, linear);
    Vec loss_sum{}, weight_sum{};
    Int correct_sum{}, wrong_sum{};
    for (int r = 0; r < R; ++r) {
      const int64_t pixel = piece.pixel(p, rows.first + r);
      const Int label = labels[r];
      const AtLabels<A> at(label, piece.interpolated, rows.weights[r], of_class);
      const Vec best = rows.best.value[r];
      const Int correct = rows.best.index[r] == label, counts = label >= 0;
      store_lanes<A>(static_cast<A*>(p.normalizer) + pixel, sums[r], piece.columns.valid);
      const Vec gap = correct ? Vec{} : best - at.logit;  // 0 to the last bit
      Vec loss;
      if constexpr (FORM == Form::focal) {
        loss = at.weight * Focal<A>(gap, sums[r], gamma).loss;
      } else {
        const Vec total = log_lanes(sums[r]);
        loss = hard * at.weight * (gap + total);
        if constexpr (FORM == Form::smooth) loss += soft * (all_classes * total - linear[r]);
      }
      loss = counts ? loss : Vec{};
      loss_sum += loss, weight_sum += counts ? at.weight : Vec{};
      correct_sum -= correct, wrong_sum -= label == OUT_OF_RANGE;
      if (p.losses != nullptr) store_lanes<A>(static_cast<A*>(p.losses) + pixel, loss, piece.columns.valid);
    }
    double* totals = p.sums + 4 * piece.unit;
    for (int i = 0; i < Pack<A>::width; ++i) {
      totals[0] += loss_sum[i], totals[1] += weight_sum[i];
      totals[2] += correct_sum[i], totals[3] += wrong_sum[i];
    }
  });
}

template <typename T>
void cross_entropy_groups_as(const CrossEntropy& p, int64_t begin, int64_t end) {
  switch (p.form()) {
    case Form::plain: return cross_entropy_groups_of<T, Form::plain>(p, begin, end);
    case Form::smooth: return cross_entropy_groups_of<T, Form::smooth>(p, begin, end);
    case Form::focal: return cross_entropy_groups_of<T, Form::focal>(p, begin, end);
  }
}

// Calls store(pixel, count, labels) with the best classes of every row of every vector.
template <typename T, typename Store>
inline void for_each_label(const Upsample& u, int64_t begin, int64_t end, Store store) {
  using A = Acc<T>;
  const ColumnBlocks<A> blocks(u.columns);
  Candidates<A> candidates(u);
  Scratch<typename Pack<A>::type> interpolated(2 * u.classes);
  for_each_group<T, false>(u, begin, end, [&](const Group<A>& group) {
    candidates.enter(group.unit, group.own, group.next);
    for (const ColumnBlock<A>& block : blocks) {
      const Classes some = candidates.of(block);
      for (int64_t i = 0; i < some.count; ++i) {
        interpolated[2 * i] = block.of(group.own + some.list[i] * group.stride);
        interpolated[2 * i + 1] = block.of(group.next + some.list[i] * group.stride);
      }
      const Piece<A> piece{group, block, interpolated};
      const auto label = [&](auto of_class) {
        for_each_rows(group.first_row, group.last_row, [&]<int R>(int64_t row) {
          RowWeights<A> weights[R];
          for (int r = 0; r < R; ++r) weights[r] = RowWeights<A>(u.rows, row + r);
          const Best<A, R> best = best_class<A, R>(interpolated, some.count, weights, of_class);
          for (int r = 0; r < R; ++r) store(piece.pixel(u, row + r), block.valid, best.index[r]);
        });
      };
      if (some.count == u.classes)
        label([](int64_t k) { return k; });  // a tenth faster than to read them
      else
        label([&](int64_t i) { return some.list[i]; });
    }
  });
}

template <typename T>
void argmax_groups_as(const Argmax& p, int64_t begin, int64_t end) {
  for_each_label<T>(p, begin, end, [&](int64_t pixel, int64_t count, typename Integers<Acc<T>>::type best) {
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
  // The last two: pixels that are ignored, labels out of range.
  Scratch<int64_t> counts(alone ? int64_t(cells) + 2 : 0);
  for (int32_t i = 0; alone && i < cells + 2; ++i) counts[i] = 0;
  for_each_label<T>(p, begin, end, [&](int64_t pixel, int64_t count, Int best) {
    const Int label = read_labels<A>(p.target, pixel, count, classes, p.ignore_index);
    typename Integers<A>::scalar cell[W], others = 0;
    store_lanes<typename Integers<A>::scalar>(cell,
                                              label >= 0 ? label * classes + best : cells - (label == OUT_OF_RANGE));
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
  Scratch<Vec> exponentials(p.classes);
  const int64_t step = p.flip ? -p.out.stride_x : p.out.stride_x;
  for_each_best<T, true>(p, begin, end, [&]<int R>(const Rows<A, R>& rows) {
    const ColumnBlock<A>& columns = rows.piece.columns;
    const int64_t x = p.flip ? p.columns.size - 1 - columns.first : columns.first;
    for (int r = 0; r < R; ++r) {
      Vec sum{};
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec own = rows.piece.interpolated[2 * k], next = rows.piece.interpolated[2 * k + 1];
        const Vec logit = rows.weights[r].own * own + rows.weights[r].next * next;
        sum += exponentials[k] = exp_lanes(logit - rows.best.value[r]);
      }
      const Vec inverse = 1 / sum;
      A* out = static_cast<A*>(p.out.data) + rows.piece.image * p.out.stride_b + (rows.first + r) * p.out.stride_y +
               x * p.out.stride_x;
      for (int64_t k = 0; k < p.classes; ++k, out += p.out.stride_c) {
        const Vec probability = exponentials[k] * inverse;
        if (step == 1 && columns.valid == Pack<A>::width) {
          store_lanes<A>(out, p.add ? load_lanes<A>(out) + probability : probability);
        } else {
          for (int64_t i = 0; i < columns.valid; ++i)
            out[i * step] = p.add ? out[i * step] + probability[i] : probability[i];
        }
      }
    }
  });
}

}  // namespace

APC_DEFINE_KERNEL(cross_entropy_groups, CrossEntropy)
APC_DEFINE_KERNEL(argmax_groups, Argmax)
APC_DEFINE_KERNEL(confusion_groups, Confusion)
APC_DEFINE_KERNEL(softmax_groups, Softmax)
