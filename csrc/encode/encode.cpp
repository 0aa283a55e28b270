// encode's operators on the CPU: check, describe the work, share it out among torch's threads. Each writes into the
// tensors it is given last.
#include "encode.h"

#include <memory>

#include "../common/run.h"

namespace {

// The operands, and memory for what units share.
struct Work {
  Encode p{};
  std::unique_ptr<char[]> sums, center;
  std::unique_ptr<double[]> counts;
};

template <typename A>
void take_center(const Encode& p, void* numbers) {
  A* const center = static_cast<A*>(numbers);
  for (int64_t c = 0; c < p.channels; ++c) {
    double sum = 0;
    for (int64_t k = 0; k < p.words; ++k) sum += static_cast<const A*>(p.codewords)[k * p.channels + c];
    center[c] = static_cast<A>(sum / p.words);
  }
}

Work described(const Tensor& x, const Tensor& codewords, const Tensor& scale, const Tensor& distances,
               const Tensor& weights) {
  check_dimensions(x, "x", 3);
  check_dimensions(codewords, "codewords", 2);
  Work work;
  Encode& p = work.p;
  p.scalar = scalar_of(x, "x");
  p.batch = x.size(0), p.channels = x.size(1), p.positions = x.size(2), p.words = codewords.size(0);
  STD_TORCH_CHECK(x.numel() > 0 && codewords.numel() > 0, "x, codewords: expected at least one number");
  p.x = x.data_ptr(), p.x_b = x.stride(0), p.x_c = x.stride(1), p.x_n = x.stride(2);
  take(p.codewords, codewords, "codewords", x, {p.words, p.channels});
  take(p.scale, scale, "scale", x, {p.words});
  take(p.distances, distances, "distances", x, {p.batch, p.words, p.positions});
  take(p.weights, weights, "weights", x, {p.batch, p.words, p.positions});
  const bool is_double = p.scalar == Scalar::float64;
  const int64_t bytes = is_double ? 8 : 4;
  work.center.reset(new char[p.channels * bytes]);
  (is_double ? take_center<double> : take_center<float>)(p, work.center.get());
  p.center = work.center.get();
  const int64_t units = p.batch * chunks_of(p), padded_words = (p.words + 31) / 32 * 32;
  work.sums.reset(new char[units * p.channels * padded_words * bytes]);
  work.counts.reset(new double[units * 3 * p.words]);
  p.sums = work.sums.get(), p.counts = work.counts.get();
  return work;
}

int64_t grain(const Encode& p) { return grain_of((p.positions < CHUNK ? p.positions : CHUNK) * p.channels * p.words); }

void encode(const Tensor& x, const Tensor& codewords, const Tensor& scale, const Tensor& encoded,
            const Tensor& distances, const Tensor& weights) {
  Work work = described(x, codewords, scale, distances, weights);
  Encode& p = work.p;
  take(p.encoded, encoded, "encoded", x, {p.batch, p.channels, p.words});
  run(encode_chunks, p, p.batch * chunks_of(p), grain(p));
  run(encode_sums, p, p.channels, grain_of(p.batch * chunks_of(p) * p.words));
}

void encode_backward(const Tensor& grad, const Tensor& x, const Tensor& codewords, const Tensor& scale,
                     const Tensor& distances, const Tensor& weights, const Tensor& grad_x, const Tensor& grad_words,
                     const Tensor& grad_scale) {
  Work work = described(x, codewords, scale, distances, weights);
  Encode& p = work.p;
  take(p.grad, grad, "grad", x, {p.batch, p.words, p.channels});
  check_shape(grad_x, "grad_x", {p.batch, p.channels, p.positions});
  check_like(grad_x, "grad_x", x, "x");
  p.grad_x = grad_x.data_ptr();
  p.grad_b = grad_x.stride(0), p.grad_c = grad_x.stride(1), p.grad_n = grad_x.stride(2);
  take(p.grad_words, grad_words, "grad_words", x, {p.words, p.channels});
  take(p.grad_scale, grad_scale, "grad_scale", x, {p.words});
  run(encode_chunk_gradients, p, p.batch * chunks_of(p), grain(p));
  run(encode_sum_gradients, p, p.channels, grain_of(p.batch * chunks_of(p) * p.words));
}

constexpr Operator OPERATORS[] = {
    {"encode(Tensor x, Tensor codewords, Tensor scale, Tensor(a!) encoded, Tensor(b!) distances, Tensor(c!) weights) "
     "-> ()",
     TORCH_BOX(&encode)},
    {"encode_backward(Tensor grad, Tensor x, Tensor codewords, Tensor scale, Tensor distances, Tensor weights, "
     "Tensor(a!) grad_x, Tensor(b!) grad_words, Tensor(c!) grad_scale) -> ()",
     TORCH_BOX(&encode_backward)},
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, OPERATORS)
