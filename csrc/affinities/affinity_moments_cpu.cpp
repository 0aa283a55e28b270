// affinity_moments' CPU kernels, compiled once for each instruction set.
//
// Differences to the affinities of a unit's first position are exact in float64, and so, nearly, are sums of their
// products: the covariance keeps the digits that a batch norm's variance loses when its terms cancel.
#include "affinities_cpu.h"

namespace {

template <typename T>
void sum_moments_as(const AffinityMoments& p, int64_t begin, int64_t end) {
  const int64_t most = p.most_regions;
  Scratch<Acc<T>> x(CHANNELS * TILE), affinity(most * TILE);
  Scratch<double> centered(most * TILE), transposed(TILE * padded(most));
  for_each_tile(p, begin, end, [&](const Tile& tile) {
    const ScaleBlock block = scale_block(p, tile.scale);
    const int64_t columns = padded(block.regions);
    double *center = p.sums + tile.unit * p.unit_sums, *sums = center + block.regions;
    affinities_of<T>(p, block, tile, x, false, affinity, nullptr);
    for (int64_t j = 0; j < block.regions; ++j) {
      if (tile.fresh) center[j] = affinity[j * TILE];
      for (int64_t n = 0; n < TILE; ++n)
        centered[j * TILE + n] = n < tile.length ? affinity[j * TILE + n] - center[j] : 0;
    }
    transpose_tile<double>(centered, block.regions, tile.length, true, transposed);
    product<double>({centered, TILE, 1}, {transposed, columns}, block.regions, TILE, columns, sums, columns,
                    !tile.fresh);
  });
}

}  // namespace

APC_DEFINE_KERNEL(sum_moments, AffinityMoments)

namespace APC_ISA {

// Means and sums of squares of two groups of positions become those of both (Chan, Golub, LeVeque 1979).
void merge_moments(const AffinityMoments& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / p.num_scales, scale = index % p.num_scales;
    const ScaleBlock block = scale_block(p, scale);
    const int64_t regions = block.regions, columns = padded(regions);
    double* mean = p.mean + image * p.rows + block.first_row;
    double* squares = p.covariance + image * p.pairs + block.first_pair;
    Scratch<double> delta(regions), own(regions);
    double count = 0;
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      const int64_t at = (chunk * p.batch + image) * p.num_scales + scale;
      const Unit unit = unit_at(p, at);
      const int64_t end_of_unit = unit.last_tile * TILE < p.positions ? unit.last_tile * TILE : p.positions;
      const double more = static_cast<double>(end_of_unit - unit.first_tile * TILE);
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
