// The operators on affinities on the CPU: the work described to the kernels, and shared out among torch's threads.
#include "affinities.h"

#include <algorithm>
#include <memory>

#include "../common/run.h"
#include "operators.h"

namespace {

int64_t units(const Affinities& a) { return a.chunks * a.batch * a.num_scales; }

// Room for sums of each unit, in the accumulator's type.
std::unique_ptr<char[]> room(const Affinities& a, int64_t numbers) {
  const int64_t size = a.scalar == Scalar::float64 ? sizeof(double) : sizeof(float);
  return std::unique_ptr<char[]>(new char[units(a) * numbers * size]);
}

struct Cpu {
  using AdaptiveContext = ::AdaptiveContext;
  using AffinityMoments = ::AffinityMoments;

  static Map describe_map(const Tensor& map) {
    Map m = map_of(map);
    if (m.width == 1 && m.stride_c != 1) m.stride_x = 1;  // the stride of a single column says nothing
    if (m.height == 1 || m.stride_y == m.width * m.stride_x) m.width *= m.height, m.height = 1;
    return m;
  }

  // Positions are always cut: into chunks of four tiles at least, so that a chunk's sums are worth keeping; at most 32
  // of an image; one where sums are large.
  static void describe(Affinities& a, const Tensor& x, const Scales& scales, bool) {
    a.scalar = scalar_of(x, "x");
    a.x = describe_map(x);
    a.num_scales = static_cast<int>(scales.size()), a.scales = scales.data();
    a.batch = x.size(0), a.channels = x.size(1) / a.num_scales, a.positions = x.size(2) * x.size(3);
    for (int64_t s : scales) {
      a.rows += s * s, a.pairs += s * s * s * s;
      a.most_regions = std::max(a.most_regions, s * s);
    }
    const int64_t tiles = (a.positions + TILE - 1) / TILE;
    a.chunks = a.most_regions > SMALL_REGIONS ? 1 : std::clamp<int64_t>(tiles / 4, 1, 32);
  }

  static void aggregate(const AdaptiveContext& p, const Tensor& z) {
    request_huge_pages(z);
    run(::aggregate, p, units(p));
  }

  static void sum_region_gradients(AdaptiveContext& p, const Tensor&) {
    const int64_t columns = padded(p.most_regions);
    const auto matrices = room(p, p.channels * columns), squares = room(p, p.most_regions * columns);
    const auto rows = room(p, p.most_regions);
    p.unit_matrices = matrices.get(), p.unit_squares = squares.get(), p.unit_rows = rows.get();
    run(::sum_region_gradients, p, units(p));
    run(::merge_region_gradients, p, p.batch * p.num_scales);
  }

  static void write_x_gradients(AdaptiveContext& p, const Tensor& grad_x) {
    request_huge_pages(grad_x);
    const auto matrices = room(p, p.channels * padded(p.most_regions)), rows = room(p, p.most_regions);
    p.unit_matrices = matrices.get(), p.unit_rows = rows.get();
    run(::write_x_gradients, p, units(p));
    run(::merge_weight_gradients, p, p.num_scales);
  }

  static void sum_moments(AffinityMoments& p, const Tensor&) {
    p.unit_sums = p.most_regions + p.most_regions * padded(p.most_regions);
    const std::unique_ptr<double[]> sums(new double[units(p) * p.unit_sums]);
    p.sums = sums.get();
    run(::sum_moments, p, units(p));
    run(::merge_moments, p, p.batch * p.num_scales);
  }
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, AFFINITY_OPERATORS<Cpu>)
