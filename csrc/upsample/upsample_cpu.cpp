// upsample_*'s forward CPU kernels, compiled once for each instruction set.
#include "candidates_cpu.h"

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

// sums = the sum of exp(logit - best); where SMOOTH, linear = that of of_class * (logit - best).
template <bool SMOOTH, typename A, int R>
inline void sum_exponentials(const Rows<A, R>& rows, int64_t classes, const A* of_class, typename Pack<A>::type* sums,
                             typename Pack<A>::type* linear) {
  using Vec = typename Pack<A>::type;
  for (int r = 0; r < R; ++r) sums[r] = linear[r] = Vec{};
  for (int64_t k = 0; k < classes; ++k) {
    const Vec own = rows.piece.interpolated[2 * k], next = rows.piece.interpolated[2 * k + 1];
    for (int r = 0; r < R; ++r) {
      const Vec below = rows.weights[r].own * own + rows.weights[r].next * next - rows.best.value[r];
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
  const A hard = static_cast<A>(1 - p.label_smoothing), soft = static_cast<A>(p.label_smoothing / p.classes);
  Scratch<A> of_class(p.classes);
  const A all_classes = weights_of_classes<A>(p, of_class);
  for_each_best<T, true>(p, begin, end, [&]<int R>(const Rows<A, R>& rows) {
    const Piece<A>& piece = rows.piece;
    Vec sums[R], linear[R];
    sum_exponentials<SMOOTH, A, R>(rows, p.classes, of_class, sums, linear);
    Vec loss_sum{}, weight_sum{};
    Int correct_sum{}, wrong_sum{};
    for (int r = 0; r < R; ++r) {
      const int64_t pixel = piece.pixel(p, rows.first + r);
      const Int label = read_labels<A>(p.target, pixel, piece.columns.valid, p.classes, p.ignore_index);
      const AtLabels<A> at(label, piece.interpolated, rows.weights[r], of_class);
      const Vec best = rows.best.value[r], total = log_lanes(sums[r]);
      const Int correct = rows.best.index[r] == label, counts = label >= 0;
      store_lanes<A>(static_cast<A*>(p.normalizer) + pixel, sums[r], piece.columns.valid);
      const Vec plain = (correct ? Vec{} : best - at.logit) + total;  // 0 to the last bit
      Vec loss = hard * at.weight * plain;
      if constexpr (SMOOTH) loss += soft * (all_classes * total - linear[r]);
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
  if (p.label_smoothing == 0)
    cross_entropy_groups_of<T, false>(p, begin, end);
  else
    cross_entropy_groups_of<T, true>(p, begin, end);
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
