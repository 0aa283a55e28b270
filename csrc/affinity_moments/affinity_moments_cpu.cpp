// affinity_moments' CPU kernels, compiled once for each instruction set.
//
// Differences to the affinities of a unit's first position are exact in float64, and so, nearly, are sums of their
// products: the covariance keeps the digits that a batch norm's variance loses when its terms cancel.
#include "../common/affinities_cpu.h"
#include "affinity_moments.h"

namespace {

template <typename T>
void sum_moments_as(const AffinityMoments& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Affinities& a = p.affinities;
  int64_t most = 0;
  for (int i = 0; i < a.num_scales; ++i) most = a.scales[i] > most ? a.scales[i] : most;
  most *= most;
  Scratch<A> x(CHANNELS * TILE), affinity(most * TILE);
  Scratch<double> centered(most * TILE), transposed(TILE * padded(most));
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at(a, index);
    const ScaleBlock block = scale_block(a, unit.scale);
    const int64_t columns = padded(block.regions);
    double *center = p.sums + index * p.unit_sums, *sums = center + block.regions;
    for (int64_t t = unit.first_tile; t < unit.last_tile; ++t) {
      const Tile tile = tile_at(a, unit, t);
      affinities_of<T>(a, block, tile, x, false, affinity, nullptr);
      const bool fresh = t == unit.first_tile;
      for (int64_t j = 0; j < block.regions; ++j) {
        if (fresh) center[j] = affinity[j * TILE];
        for (int64_t n = 0; n < TILE; ++n)
          centered[j * TILE + n] = n < tile.length ? affinity[j * TILE + n] - center[j] : 0;
      }
      transpose_tile<double>(centered, block.regions, tile.length, true, transposed);
      product<double>({centered, TILE, 1}, {transposed, columns}, block.regions, TILE, columns, sums, columns, !fresh);
    }
  }
}

}  // namespace

namespace APC_ISA {

void sum_moments(const AffinityMoments& p, int64_t begin, int64_t end) {
  switch (p.affinities.scalar) {
    case Scalar::float32: return sum_moments_as<float>(p, begin, end);
    case Scalar::float64: return sum_moments_as<double>(p, begin, end);
    case Scalar::bfloat16: return sum_moments_as<BFloat16>(p, begin, end);
    case Scalar::float16: return sum_moments_as<Half>(p, begin, end);
  }
}

// Means and sums of squares of two groups of positions become those of both (Chan, Golub, LeVeque 1979).
void merge_moments(const AffinityMoments& p, int64_t begin, int64_t end) {
  const Affinities& a = p.affinities;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / a.num_scales, scale = index % a.num_scales;
    const ScaleBlock block = scale_block(a, scale);
    const int64_t regions = block.regions, columns = padded(regions);
    double* mean = p.mean + image * a.rows + block.first_row;
    double* squares = p.covariance + image * a.pairs + block.first_pair;
    Scratch<double> delta(regions), own(regions);
    double count = 0;
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      const int64_t at = (chunk * a.batch + image) * a.num_scales + scale;
      const Unit unit = unit_at(a, at);
      const Tile last = tile_at(a, unit, unit.last_tile - 1);
      const double more = static_cast<double>(last.first + last.length - unit.first_tile * TILE);
      const double *center = p.sums + at * p.unit_sums, *sums = center + regions;
      const double weight = count * more / (count + more);
      for (int64_t j = 0; j < regions; ++j) {
        own[j] = sums[j * columns + regions] / more;
        delta[j] = chunk == 0 ? 0 : center[j] + own[j] - mean[j];
      }
      for (int64_t j = 0; j < regions; ++j)
        for (int64_t k = 0; k < regions; ++k) {
          const double of_chunk = sums[j * columns + k] - more * (own[j] * own[k]);
          double& total = squares[j * regions + k];
          total = chunk == 0 ? of_chunk : total + of_chunk + weight * (delta[j] * delta[k]);
        }
      count += more;
      for (int64_t j = 0; j < regions; ++j)
        mean[j] = chunk == 0 ? center[j] + own[j] : mean[j] + delta[j] * (more / count);
    }
    for (int64_t j = 0; j < regions * regions; ++j) squares[j] /= count;
  }
}

}  // namespace APC_ISA
