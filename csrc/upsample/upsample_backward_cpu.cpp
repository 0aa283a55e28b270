// upsample_cross_entropy's backward CPU kernels, compiled once for each instruction set.
#include "bands_cpu.h"

namespace {

template <typename T, Form FORM>
class CrossEntropyGradient {
  using A = Acc<T>;
  using Vec = typename Pack<A>::type;
  using Int = typename Integers<A>::type;
  static constexpr int W = Pack<A>::width;

  const CrossEntropy& p;
  const Scratch<A> of_class{p.classes};  // weights of classes
  const A all_classes = weights_of_classes<A>(p, of_class);

 public:
  using Problem = CrossEntropy;
  static constexpr bool SOFTMAX = true;

  struct Pixels {
    Vec most;   // the largest logit; infinite where there is no label: exp(logit - most) is 0 then
    Vec scale;  // of exp(logit - most)
    Vec own;    // the gradient of the label's logit
    Vec soft;   // label smoothing: times a class's weight, subtracted from its gradient
    Int label;
  };

  explicit CrossEntropyGradient(const CrossEntropy& p) : p(p) {}

  template <int R>
  void describe(int64_t image, int64_t row, const RowWeights<A>* weights, const ColumnBlock<A>& block,
                const Vec* interpolated, Pixels* to) const {
    const Best<A, R> best = best_class<A, R>(interpolated, p.classes, weights);
    for (int r = 0; r < R; ++r) to[r] = pixels_at(image, row + r, weights[r], block, interpolated, best.value[r]);
  }

  auto gradient_of(int64_t, int64_t k) const {
    const Int wanted = Int{} + static_cast<typename Integers<A>::scalar>(k);
    return [wanted, weight = of_class[k]](Vec logit, const Pixels& pixel) {
      const Vec probability = exp_lanes<true>(logit - pixel.most) * pixel.scale;
      Vec gradient = pixel.label == wanted ? pixel.own : probability;
      if constexpr (FORM == Form::smooth) gradient -= pixel.soft * weight;
      return gradient;
    };
  }

 private:
  Pixels pixels_at(int64_t image, int64_t row, const RowWeights<A>& weight, const ColumnBlock<A>& block,
                   const Vec* interpolated, Vec most) const {
    const int64_t pixel = (image * p.rows.size + row) * p.columns.size + block.first;
    const A hard = static_cast<A>(1 - p.label_smoothing), soft = static_cast<A>(p.label_smoothing / p.classes);
    const Int label = read_labels<A>(p.target, pixel, block.valid, p.classes, p.ignore_index);
    const AtLabels<A> at(label, interpolated, weight, of_class);
    A normalizer[W], grad[W];
    for (int i = 0; i < W; ++i) {
      const int64_t lane = pixel + (i < block.valid ? i : 0);
      normalizer[i] = static_cast<const A*>(p.normalizer)[lane];
      grad[i] = static_cast<const A*>(p.grad)[p.grad_is_scalar ? 0 : lane];
    }
    Vec sum = load_lanes<A>(normalizer);
    const Vec upstream = load_lanes<A>(grad);
    const Vec smooth = upstream * soft;
    Vec scale = upstream * hard * at.weight + smooth * all_classes;
    Vec own = scale * ((exp_lanes(at.logit - most) - sum) / sum) + smooth * all_classes;
    if constexpr (FORM == Form::focal) {
      const Focal<A> focal(most - at.logit, sum, static_cast<A>(p.focal));
      scale = upstream * at.weight * focal.gradient;
      own = -scale * focal.rest;
      sum = focal.sum;
    }
    const Int counts = label >= 0;
    const Vec none = Vec{} + static_cast<A>(__builtin_inf()), wrong = Vec{} + static_cast<A>(__builtin_nan(""));
    return {.most = counts ? most : none,
            .scale = counts ? scale / sum : (label == OUT_OF_RANGE ? wrong : Vec{}),
            .own = own,
            .soft = counts ? smooth : Vec{},
            .label = label};
  }
};

template <typename T>
void cross_entropy_backward_bands_as(const CrossEntropy& p, int64_t begin, int64_t end) {
  switch (p.form()) {
    case Form::plain: return run_bands<T, CrossEntropyGradient<T, Form::plain>>(p, begin, end);
    case Form::smooth: return run_bands<T, CrossEntropyGradient<T, Form::smooth>>(p, begin, end);
    case Form::focal: return run_bands<T, CrossEntropyGradient<T, Form::focal>>(p, begin, end);
  }
}

}  // namespace

APC_DEFINE_KERNEL(cross_entropy_backward_bands, CrossEntropy)
