// upsample_region_sums' CPU kernels, compiled once for each instruction set.
#include "bands_cpu.h"
#include "pieces_cpu.h"

namespace {

constexpr int64_t FEW = 16;     // classes: with more, pixels are added one by one to the sums of their labels
constexpr int64_t VISITS = 16;  // longer sums than those of so many blocks of rows are in double

template <typename A>
struct Sigmoid {
  typename Pack<A>::type p, slope;  // and the derivative, without a difference near 1

  explicit Sigmoid(typename Pack<A>::type logit) {
    const auto small = exp_lanes(logit < 0 ? logit : -logit), inverse = 1 / (1 + small);
    p = logit < 0 ? small * inverse : inverse;
    slope = small * inverse * inverse;
  }
};

// The labels of a vector of pixels; for masks, those of one class: 0 and 1.
template <typename A>
inline typename Integers<A>::type region_labels(const RegionSums& p, int64_t image, int64_t k, int64_t row,
                                                const ColumnBlock<A>& columns) {
  const int64_t plane = p.masks ? image * p.classes + k : image, classes = p.masks ? 2 : p.classes;
  const int64_t pixel = (plane * p.rows.size + row) * p.columns.size + columns.first;
  return read_labels<A>(p.target, pixel, columns.valid, classes, p.ignore_index);
}

template <typename A>
inline typename Integers<A>::type label_of(const RegionSums& p, int64_t k) {
  return typename Integers<A>::type{} + static_cast<typename Integers<A>::scalar>(p.masks ? 1 : k);
}

// The weights of pixels' labels: 0 where they are ignored, NaN where they are out of range.
template <typename A>
inline typename Pack<A>::type weights_at(const A* weight, typename Integers<A>::type label) {
  const typename Pack<A>::type none{}, wrong = none + static_cast<A>(__builtin_nan(""));
  typename Pack<A>::type given = none + 1;
  if (weight != nullptr)
    for (int i = 0; i < Pack<A>::width; ++i) given[i] = weight[label[i] < 0 ? 0 : label[i]];
  return label >= 0 ? given : (label == OUT_OF_RANGE ? wrong : none);
}

// The sums of a unit: those of p, t, p * t and p * p for each class, in vectors.
template <typename A>
class Totals {
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  static constexpr int W = Pack<A>::width;

  const RegionSums& p;
  const Scratch<Vec> sums{4 * p.classes};
  Int wrong{};
  int64_t unit = -1, visits = 0;

 public:
  explicit Totals(const RegionSums& p) : p(p) { clear(); }
  ~Totals() { add_up(); }

  // Before the sums of a block of rows are added.
  void visit(int64_t unit) {
    if (unit != this->unit || visits == VISITS) add_up();
    this->unit = unit, ++visits;
  }
  Vec* of_class(int64_t k) const { return sums + 4 * k; }
  void count_wrong(Int label) { wrong -= label == OUT_OF_RANGE; }

 private:
  void clear() {
    for (int64_t i = 0; i < 4 * p.classes; ++i) sums[i] = Vec{};
    wrong = Int{}, visits = 0;
  }

  void add_up() {
    if (unit < 0) return;
    for (int64_t i = 0; i < 4 * p.classes; ++i) {
      double sum = 0;
      for (int lane = 0; lane < W; ++lane) sum += sums[i][lane];
      p.sums[unit * 4 * p.classes + i] += sum;
    }
    for (int lane = 0; lane < W; ++lane) p.wrong[unit] += wrong[lane];
    clear();
  }
};

// Adds a vector of pixels to the sums of t and p * t of their labels, whose exponentials are `step` vectors apart.
template <typename A>
inline void add_at_labels(const Totals<A>& totals, typename Integers<A>::type label,
                          const typename Pack<A>::type* exponentials, int step, typename Pack<A>::type inverse,
                          typename Pack<A>::type weight) {
  using Scalar = typename Integers<A>::scalar;
  constexpr int W = Pack<A>::width;
  const typename Pack<A>::type none{};
  Scalar inside[W];
  A at_label[W], weights[W], weighted[W];
  store_lanes<Scalar>(inside, label < 0 ? typename Integers<A>::type{} : label);
  for (int i = 0; i < W; ++i) at_label[i] = exponentials[inside[i] * step][i];
  store_lanes<A>(weights, weight);
  store_lanes<A>(weighted, weight != 0 ? load_lanes<A>(at_label) * inverse * weight : none);
  for (int i = 0; i < W; ++i) {
    A* lane = reinterpret_cast<A*>(totals.of_class(inside[i])) + i;
    lane[W] += weights[i], lane[2 * W] += weighted[i];
  }
}

template <typename T>
void softmax_sums(const RegionSums& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  Totals<A> totals(p);
  Scratch<Vec> exponentials(ROWS * p.classes);  // (classes, R)
  const bool few = p.classes <= FEW;
  for_each_best<T, true>(p, begin, end, [&]<int R>(const Rows<A, R>& rows) {
    const Piece<A>& piece = rows.piece;
    totals.visit(piece.unit);
    Vec sums[R]{}, inverse[R], weight[R];
    for (int64_t k = 0; k < p.classes; ++k) {
      const Vec own = piece.interpolated[2 * k], next = piece.interpolated[2 * k + 1];
      for (int r = 0; r < R; ++r) {
        const Vec logit = rows.weights[r].own * own + rows.weights[r].next * next;
        sums[r] += exponentials[k * R + r] = exp_lanes(logit - rows.best.value[r]);
      }
    }
    Int label[R];
    for (int r = 0; r < R; ++r) {
      label[r] = region_labels<A>(p, piece.image, 0, rows.first + r, piece.columns);
      totals.count_wrong(label[r]);
      inverse[r] = 1 / sums[r], weight[r] = weights_at<A>(static_cast<const A*>(p.weight), label[r]);
      if (!few) add_at_labels<A>(totals, label[r], exponentials + r, R, inverse[r], weight[r]);
    }
    for (int64_t k = 0; k < p.classes; ++k) {
      const Int wanted = label_of<A>(p, k);
      Vec of_class[4]{};
      for (int r = 0; r < R; ++r) {
        const Vec probability = weight[r] != 0 ? exponentials[k * R + r] * inverse[r] : Vec{};
        const Vec weighted = probability * weight[r];
        of_class[0] += weighted, of_class[3] += probability * weighted;
        if (few) {
          of_class[1] += label[r] == wanted ? weight[r] : Vec{};
          of_class[2] += label[r] == wanted ? weighted : Vec{};
        }
      }
      for (int i = 0; i < 4; ++i) totals.of_class(k)[i] += of_class[i];
    }
  });
}

template <typename T, bool MASKS>
void sigmoid_sums(const RegionSums& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  Totals<A> totals(p);
  for_each_piece<T, false>(p, begin, end, [&](const Piece<A>& piece) {
    for_each_rows(piece.first_row, piece.last_row, [&]<int R>(int64_t row) {
      totals.visit(piece.unit);
      RowWeights<A> rows[R];
      Int label[R];
      Vec weight[R];
      const auto read = [&](int r, int64_t k) {
        label[r] = region_labels<A>(p, piece.image, k, row + r, piece.columns);
        weight[r] = weights_at<A>(static_cast<const A*>(p.weight), label[r]);
        totals.count_wrong(label[r]);
      };
      for (int r = 0; r < R; ++r) {
        rows[r] = RowWeights<A>(p.rows, row + r);
        if constexpr (!MASKS) read(r, 0);
      }
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec own = piece.interpolated[2 * k], next = piece.interpolated[2 * k + 1];
        Vec sums[4]{};
        for (int r = 0; r < R; ++r) {
          if constexpr (MASKS) read(r, k);
          const Sigmoid<A> sigmoid(rows[r].own * own + rows[r].next * next);
          const Vec probability = weight[r] != 0 ? sigmoid.p : Vec{}, weighted = probability * weight[r];
          const Int inside = label[r] == label_of<A>(p, k);
          sums[0] += weighted, sums[1] += inside ? weight[r] : Vec{};
          sums[2] += inside ? weighted : Vec{}, sums[3] += probability * weighted;
        }
        for (int i = 0; i < 4; ++i) totals.of_class(k)[i] += sums[i];
      }
    });
  });
}

template <typename T>
void region_sums_groups_as(const RegionSums& p, int64_t begin, int64_t end) {
  if (!p.sigmoid)
    softmax_sums<T>(p, begin, end);
  else if (p.masks)
    sigmoid_sums<T, true>(p, begin, end);
  else
    sigmoid_sums<T, false>(p, begin, end);
}

// The derivative of what is made of the sums by p of one class: sum + 2 * square * p, and for its own pixels + overlap.
template <typename A>
struct Slope {
  A sum, overlap, square;

  Slope(const RegionSums& p, int64_t image, int64_t k) {
    const A* grad = static_cast<const A*>(p.grad) + image * p.classes + k;
    const int64_t step = p.batch * p.classes;
    sum = grad[0], overlap = grad[2 * step], square = 2 * grad[3 * step];
  }
};

template <typename T>
struct SoftmaxSumsGradient {
  using A = Acc<T>;
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  using Problem = RegionSums;
  static constexpr bool SOFTMAX = true;

  struct Pixels {
    Vec most;       // the largest logit; infinite where there is no label: exp(logit - most) is 0 then
    Vec inverse;    // of the sum of exp(logit - most)
    Vec reference;  // the slope of the largest logit's class: what is left of the others is small if p is near 1
    Vec mean;       // of the classes' slopes minus this one, weighted with their probabilities
    Vec weight;
    Int label, best;  // best: the class of the largest logit
  };

  const RegionSums& p;

  template <int R>
  void describe(int64_t image, int64_t row, const RowWeights<A>* weights, const ColumnBlock<A>& columns,
                const Vec* interpolated, Pixels* to) const {
    const Best<A, R> best = best_class<A, R>(interpolated, p.classes, weights);
    // Of the last two, without the likeliest class's: its slope minus itself is 0, not a difference that is rounded.
    Vec sums[R]{}, slopes[R]{}, square_of_best[R]{}, others[R]{}, squares[R]{};
    for (int r = 0; r < R; ++r) {
      to[r].best = best.index[r];
      to[r].label = region_labels<A>(p, image, 0, row + r, columns);
      to[r].weight = weights_at<A>(static_cast<const A*>(p.weight), to[r].label);
      to[r].reference = Vec{};
    }
    for (int64_t k = 0; k < p.classes; ++k) {
      const Slope<A> slope(p, image, k);
      const Vec sum = Vec{} + slope.sum, of_label = sum + slope.overlap;
      const Int wanted = label_of<A>(p, k);
      for (int r = 0; r < R; ++r) {
        const Int is_best = best.index[r] == wanted;
        to[r].reference = is_best ? (to[r].label == wanted ? of_label : sum) : to[r].reference;
        square_of_best[r] = is_best ? Vec{} + slope.square : square_of_best[r];
      }
    }
    for (int64_t k = 0; k < p.classes; ++k) {
      const Slope<A> slope(p, image, k);
      const Vec sum = Vec{} + slope.sum, of_label = sum + slope.overlap;
      for (int r = 0; r < R; ++r) {
        const Vec logit = weights[r].own * interpolated[2 * k] + weights[r].next * interpolated[2 * k + 1];
        const Vec exponential = exp_lanes(logit - best.value[r]);
        const Int wanted = label_of<A>(p, k);
        const Vec other = best.index[r] == wanted ? Vec{} : exponential;
        sums[r] += exponential, others[r] += other;
        slopes[r] += exponential * ((to[r].label == wanted ? of_label : sum) - to[r].reference);
        squares[r] += other * other * slope.square;
      }
    }
    for (int r = 0; r < R; ++r) {
      const Vec inverse = 1 / sums[r];
      to[r].most = to[r].weight != 0 ? best.value[r] : Vec{} + static_cast<A>(__builtin_inf());
      to[r].inverse = to[r].weight != 0 ? inverse : Vec{};
      const Vec square = square_of_best[r] * inverse;
      to[r].mean = to[r].weight != 0 ? (slopes[r] + squares[r] * inverse - square * others[r]) * inverse : Vec{};
      to[r].reference = to[r].weight != 0 ? to[r].reference + square : Vec{};
    }
  }

  auto gradient_of(int64_t image, int64_t k) const {
    const Slope<A> slope(p, image, k);
    const Vec sum = Vec{} + slope.sum, of_label = sum + slope.overlap, square = Vec{} + slope.square;
    return [=, wanted = label_of<A>(p, k)](Vec logit, const Pixels& pixel) {
      const Vec probability = exp_lanes<true>(logit - pixel.most) * pixel.inverse;
      const Vec own = (pixel.label == wanted ? of_label : sum) + square * probability - pixel.reference;
      return probability * pixel.weight * ((pixel.best == wanted ? Vec{} : own) - pixel.mean);
    };
  }
};

template <typename T, bool MASKS>
struct SigmoidSumsGradient {
  using A = Acc<T>;
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  using Problem = RegionSums;
  static constexpr bool SOFTMAX = false;

  struct Pixels {
    const ColumnBlock<A>* columns;
    int64_t row;
    Int label;   // not of masks
    Vec weight;  // neither
  };

  const RegionSums& p;

  template <int R>
  void describe(int64_t image, int64_t row, const RowWeights<A>*, const ColumnBlock<A>& columns, const Vec*,
                Pixels* to) const {
    for (int r = 0; r < R; ++r) {
      to[r].columns = &columns, to[r].row = row + r;
      if constexpr (!MASKS) {
        to[r].label = region_labels<A>(p, image, 0, row + r, columns);
        to[r].weight = weights_at<A>(static_cast<const A*>(p.weight), to[r].label);
      }
    }
  }

  auto gradient_of(int64_t image, int64_t k) const {
    const Slope<A> slope(p, image, k);
    const Vec sum = Vec{} + slope.sum, of_label = sum + slope.overlap, square = Vec{} + slope.square;
    return [=, &p = p, wanted = label_of<A>(p, k)](Vec logit, const Pixels& pixel) {
      const Int label = MASKS ? region_labels<A>(p, image, k, pixel.row, *pixel.columns) : pixel.label;
      const Vec weight = MASKS ? weights_at<A>(nullptr, label) : pixel.weight;
      const Sigmoid<A> sigmoid(logit);
      const Vec own = (label == wanted ? of_label : sum) + square * sigmoid.p;
      return weight != 0 ? weight * sigmoid.slope * own : Vec{};
    };
  }
};

template <typename T>
void region_sums_backward_bands_as(const RegionSums& p, int64_t begin, int64_t end) {
  if (!p.sigmoid)
    run_bands<T, SoftmaxSumsGradient<T>>(p, begin, end);
  else if (p.masks)
    run_bands<T, SigmoidSumsGradient<T, true>>(p, begin, end);
  else
    run_bands<T, SigmoidSumsGradient<T, false>>(p, begin, end);
}

}  // namespace

APC_DEFINE_KERNEL(region_sums_groups, RegionSums)
APC_DEFINE_KERNEL(region_sums_backward_bands, RegionSums)
