// pyramid_reduce's operators on the CPU: check, describe the work, share it out among torch's threads. Each writes into
// the tensors it is given last.
#include "pyramid_reduce.h"

#include <memory>

#include "../common/run.h"

namespace {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

// What each scale's convolution and batch norm have, (5, S): weight, gamma, beta, running mean, running variance.
enum Part { WEIGHT, GAMMA, BETA, MEAN, VARIANCE };

PyramidReduce described(const Tensor& regions, const Tensors& parameters, const Scales& scales,
                        std::vector<Reduction>& reductions) {
  check_dimensions(regions, "regions", 3);
  PyramidReduce p{};
  p.scalar = scalar_of(regions, "regions");
  STD_TORCH_CHECK(p.scalar == Scalar::float32 || p.scalar == Scalar::float64, "regions: expected float32 or float64");
  p.batch = regions.size(0), p.channels = regions.size(1), p.rows = regions.size(2);
  p.num_scales = static_cast<int64_t>(scales.size()), p.scales = scales.data();
  int64_t all = 0;
  for (int64_t s : scales) {
    STD_TORCH_CHECK(s >= 1 && s <= MAX_SCALE, "scales: expected scales of 1 to ", MAX_SCALE);
    all += s * s;
  }
  STD_TORCH_CHECK(p.num_scales <= MAX_SCALES, "scales: expected 1 to ", MAX_SCALES, " scales");
  STD_TORCH_CHECK(p.num_scales > 0 && all == p.rows, "regions: expected ", all, " regions, got ", p.rows);
  STD_TORCH_CHECK(regions.numel() > 0, "regions: expected at least one number");
  check_contiguous(regions, "regions");
  p.regions = regions.data_ptr();
  STD_TORCH_CHECK(static_cast<int64_t>(parameters.size()) >= 3 * p.num_scales, "parameters: expected three a scale");
  check_dimensions(parameters[0], "weight", 4);
  p.outputs = parameters[0].size(0);
  reductions.resize(p.num_scales);
  for (int64_t i = 0; i < p.num_scales; ++i) {
    const auto at = [&](Part part) -> const Tensor& { return parameters[part * p.num_scales + i]; };
    check_beside(at(WEIGHT), "weight", regions, "regions", {p.outputs, p.channels, 1, 1});
    check_beside(at(GAMMA), "gamma", regions, "regions", {p.outputs});
    check_beside(at(BETA), "beta", regions, "regions", {p.outputs});
    reductions[i].weight = at(WEIGHT).data_ptr();
    reductions[i].gamma = at(GAMMA).data_ptr(), reductions[i].beta = at(BETA).data_ptr();
  }
  p.reductions = reductions.data();
  return p;
}

// Memory for regions in panels, of columns or of channels, and the numbers in them.
std::unique_ptr<char[]> pack(PyramidReduce& p, void*& panels, int64_t count) {
  std::unique_ptr<char[]> memory(new char[count * (p.scalar == Scalar::float64 ? 8 : 4)]);
  panels = memory.get();
  run(pyramid_reduce_pack, p, p.num_scales * channel_blocks(p), grain_of(REGION_PANEL * p.batch * p.rows));
  return memory;
}

int64_t grain(const PyramidReduce& p) { return grain_of(OUTPUTS * p.channels * p.batch); }

void take_saved(PyramidReduce& p, const Tensor& products, const Tensor& statistics, const Tensor& regions) {
  check_beside(products, "products", regions, "regions", {p.outputs * p.batch * p.rows});
  p.products = products.data_ptr();
  take(p.statistics, statistics, "statistics", regions, {2, p.num_scales, p.outputs}, true);
}

// Moves the running statistics towards those of the batch in training. products and statistics are for the backward.
void pyramid_reduce(const Tensor& regions, const Tensors& parameters, const Scales& scales, const Numbers& eps,
                    const Numbers& momentum, bool training, const MaybeTensor& products, const MaybeTensor& statistics,
                    const Tensor& result) {
  std::vector<Reduction> reductions;
  PyramidReduce p = described(regions, parameters, scales, reductions);
  const size_t count = scales.size();
  STD_TORCH_CHECK(parameters.size() == 5 * count && eps.size() == count && momentum.size() == count,
                  "parameters, eps, momentum: expected five, one and one a scale");
  STD_TORCH_CHECK(products.has_value() == statistics.has_value(), "products, statistics: expected both or neither");
  for (size_t i = 0; i < count; ++i) {
    const Tensor &mean = parameters[MEAN * count + i], &variance = parameters[VARIANCE * count + i];
    check_beside(mean, "running_mean", regions, "regions", {p.outputs});
    check_beside(variance, "running_var", regions, "regions", {p.outputs});
    reductions[i].running_mean = mean.data_ptr(), reductions[i].running_var = variance.data_ptr();
    reductions[i].eps = eps[i], reductions[i].momentum = momentum[i];
    STD_TORCH_CHECK(!training || p.batch * scales[i] * scales[i] > 1,
                    "regions: expected more than one value per channel in training");
  }
  p.training = training;
  if (products) take_saved(p, *products, *statistics, regions);
  check_beside(result, "result", regions, "regions", {p.batch, p.outputs, p.rows});
  p.result = result.data_ptr();
  int64_t columns = 0;
  for (int64_t s : scales) columns += padded(p.batch * s * s);
  const auto memory = pack(p, p.by_column, columns * p.channels);
  run(::pyramid_reduce, p, p.num_scales * output_blocks(p), grain(p));
}

// The gradients of weights, gammas and betas, (3, S), and of the regions.
void pyramid_reduce_backward(const Tensor& grad, const Tensor& regions, const Tensors& parameters, const Scales& scales,
                             bool training, const Tensor& products, const Tensor& statistics, const Tensor& result,
                             const Tensors& gradients, const MaybeTensor& grad_regions) {
  std::vector<Reduction> reductions;
  PyramidReduce p = described(regions, parameters, scales, reductions);
  p.training = training;
  take_saved(p, products, statistics, regions);
  for (const Tensor& each : {grad, result})
    check_beside(each, "grad, result", regions, "regions", {p.batch, p.outputs, p.rows});
  p.grad = grad.data_ptr(), p.result = result.data_ptr();
  STD_TORCH_CHECK(static_cast<int64_t>(gradients.size()) == 3 * p.num_scales, "gradients: expected three a scale");
  for (int64_t i = 0; i < p.num_scales; ++i) {
    const auto at = [&](Part part) -> const Tensor& { return gradients[part * p.num_scales + i]; };
    check_beside(at(WEIGHT), "gradient of weight", regions, "regions", {p.outputs, p.channels, 1, 1});
    check_beside(at(GAMMA), "gradient of gamma", regions, "regions", {p.outputs});
    check_beside(at(BETA), "gradient of beta", regions, "regions", {p.outputs});
    reductions[i].grad_weight = at(WEIGHT).data_ptr();
    reductions[i].grad_gamma = at(GAMMA).data_ptr(), reductions[i].grad_beta = at(BETA).data_ptr();
  }
  const auto memory = pack(p, p.by_channel, p.batch * p.rows * padded(p.channels));
  std::unique_ptr<char[]> of_products(new char[products.numel() * products.element_size()]);
  p.gradients = of_products.get();
  run(pyramid_reduce_gradients, p, p.num_scales * output_blocks(p), grain(p));
  if (grad_regions) {
    check_beside(*grad_regions, "grad_regions", regions, "regions", {p.batch, p.channels, p.rows});
    p.grad_regions = grad_regions->data_ptr();
    run(pyramid_reduce_region_gradients, p, p.num_scales * channel_blocks(p), grain_of(REGION_PANEL * p.outputs));
  }
}

constexpr Operator OPERATORS[] = {
    {"pyramid_reduce(Tensor regions, Tensor(a!)[] parameters, int[] scales, float[] eps, float[] momentum, bool "
     "training, "
     "Tensor(b!)? products, Tensor(c!)? statistics, Tensor(d!) result) -> ()",
     TORCH_BOX(&pyramid_reduce)},
    {"pyramid_reduce_backward(Tensor grad, Tensor regions, Tensor[] parameters, int[] scales, bool training, "
     "Tensor products, Tensor statistics, Tensor result, Tensor(a!)[] gradients, Tensor(b!)? grad_regions) -> ()",
     TORCH_BOX(&pyramid_reduce_backward)},
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, OPERATORS)
