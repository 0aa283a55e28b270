// affinity_moments' CUDA kernels for float32 maps, and the second one for all. The map is read once, and affinities
// stay where they are computed:
//
//   sum_moments    a block sums A − origin and (A − origin)(A − origin)ᵀ over the tiles of its chunk; the origin is the
//                  affinity vector of the chunk's first position, so that nothing large cancels
//   merge_moments  puts the chunks together in order, each with a mean of its own (Chan, Golub and LeVeque 1979)
//
// Each kernel's least, everything moved once, for B images of C channels a scale, N positions, J = sum of s^2 regions
// and P = sum of s^4 pairs of them:
//
//   sum_moments    moves x, bias, workspace; computes 2*B*N*J*C, 2*B*N*P more
//   merge_moments  moves workspace, mean, covariance; computes B*P
//
// Sums are float64, in which products of two float32 numbers are exact.
#pragma once

#include "tiles.cuh"

constexpr int SUM_MOMENTS_SHARED_BYTES = Shared::BYTES + MAX_REGIONS * sizeof(float);

// grid (batch * scales * chunks), THREADS threads
template <int V>
__global__ void __launch_bounds__(THREADS, 2) sum_moments(const AffinityMomentsCuda p) {
  using Access = MapAccess<V>;
  SHARED_BUFFER(buffer);
  const Shared shared(buffer);
  float* origin = reinterpret_cast<float*>(buffer + Shared::BYTES);  // [MAX_REGIONS]
  // Threads stand 16 x 16 and have 4 x 4 products each; those below the diagonal follow from the others.
  const int j = static_cast<int>(threadIdx.x) / 16 * 4, k = static_cast<int>(threadIdx.x) % 16 * 4;
  double sums[4] = {}, squares[4][4] = {};
  for_each_tile(p, shared, [&](const Work& work, const Tile& tile) {
    const Window x = open_window(p, p.x, work, tile.first, shared.offsets);
    __syncthreads();
    Product<MAX_REGIONS, false> affinities = affinities_of<Access>(p, shared, work, x);
    if (tile.first_of_chunk)
      for_each(affinities, [&](int n, int region, float a) {
        if (n == 0) origin[region] = a;
      });
    __syncthreads();
    for_each(affinities,
             [&](int n, int region, float a) { shared.scratch[n * TILE_PITCH + region] = a - origin[region]; });
    __syncthreads();
    if (j <= k && k < work.regions)
      for (int n = 0; n < tile.count; ++n) {
        const Vector<float, 4> left = load_vector<4>(shared.scratch + n * TILE_PITCH + j);
        const Vector<float, 4> right = load_vector<4>(shared.scratch + n * TILE_PITCH + k);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (j == k) sums[r] += static_cast<double>(left.at[r]);
#pragma unroll
          for (int c = 0; c < 4; ++c)
            squares[r][c] += static_cast<double>(left.at[r]) * static_cast<double>(right.at[c]);
        }
      }
  });

  const Work work = *shared.work;
  const int64_t slice = int64_t(work.b) * p.chunks + work.chunk, row = slice * p.rows + work.first_row;
  double* to = p.squares + slice * p.pairs + work.first_pair;
  if (j <= k)
    for (int r = 0; r < 4; ++r)
      for (int c = 0; c < 4; ++c)
        if (j + r < work.regions && k + c < work.regions) {
          to[(j + r) * work.regions + k + c] = squares[r][c];
          to[(k + c) * work.regions + j + r] = squares[r][c];
        }
  if (j == k)
    for (int r = 0; r < 4; ++r)
      if (j + r < work.regions) p.sums[row + j + r] = sums[r], p.origins[row + j + r] = origin[j + r];
}

// grid (batch * scales, 16 rows of pairs each): a thread puts together one pair of regions
static __global__ void merge_moments(const AffinityMomentsCuda p) {
  const int b = static_cast<int>(blockIdx.x) / p.num_scales, scale = static_cast<int>(blockIdx.x) % p.num_scales;
  int first_row = 0, first_pair = 0;
  for (int i = 0; i < scale; ++i) first_row += p.sizes[i], first_pair += p.sizes[i] * p.sizes[i];
  const int regions = p.sizes[scale];
  const int pair = static_cast<int>(blockIdx.y) * THREADS + static_cast<int>(threadIdx.x);
  if (pair >= regions * regions) return;
  const int j = pair / regions, k = pair % regions;
  double count = 0, mean_j = 0, mean_k = 0, square = 0;
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    const int64_t slice = int64_t(b) * p.chunks + chunk, row = slice * p.rows + first_row;
    const double n = min(p.chunk_tiles * TILE, p.positions - chunk * p.chunk_tiles * TILE), both = count + n;
    const double sum_j = p.sums[row + j], sum_k = p.sums[row + k];
    const double step_j = p.origins[row + j] + sum_j / n - mean_j, step_k = p.origins[row + k] + sum_k / n - mean_k;
    square += p.squares[slice * p.pairs + first_pair + pair] - sum_j * sum_k / n + step_j * step_k * (count * n / both);
    mean_j += step_j * (n / both), mean_k += step_k * (n / both);
    count = both;
  }
  p.covariance[int64_t(b) * p.pairs + first_pair + pair] = square / count;
  if (k == 0) p.mean[int64_t(b) * p.rows + first_row + j] = mean_j;
}
