// affinity_moments' CUDA kernels for float32 maps, and the second one for all. The map is read once, and affinities
// stay where they are computed:
//
//   sum_moments    a block sums A − origin and (A − origin)(A − origin)ᵀ over the tiles of its chunk; the origin is the
//                  affinity vector of the chunk's first position, so that nothing large cancels
//   merge_moments  finds the mean of all chunks, and moves each chunk's squares there (Chan, Golub and LeVeque 1979)
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

// A block of merge_moments has MERGE_PAIRS pairs of a scale's regions, and for each of them MOMENT_PARTS threads that
// share out the chunks. As many as there are share out those of each region's mean.
constexpr int MERGE_PAIRS = 128, MOMENT_PARTS = 2, MERGE_THREADS = MERGE_PAIRS * MOMENT_PARTS;
constexpr int MEAN_PARTS = MERGE_THREADS / MAX_REGIONS;
constexpr int MERGE_MOMENTS_SHARED_BYTES = 2 * MERGE_THREADS * sizeof(double);
struct MergeMomentsCuda : AffinityMomentsCuda {
  double of_whole, of_last;  // positions of a whole chunk, and of an image's last one
  // 1 / those, and 1 / all positions: a division takes a GPU dozens of instructions.
  double share_of_whole, share_of_last, share_of_all;
};
static_assert(sizeof(MergeMomentsCuda) < 4096);
static inline __device__ constexpr int stretches_of_pairs(int regions) {
  return (regions * regions + MERGE_PAIRS - 1) / MERGE_PAIRS;
}

// grid (batch, stretches of pairs of all scales), MERGE_THREADS threads
static __global__ void merge_moments(const MergeMomentsCuda p) {
  SHARED_BUFFER(buffer);
  double* parts_of_means = reinterpret_cast<double*>(buffer);  // [MEAN_PARTS][MAX_REGIONS]
  double* parts = parts_of_means + MERGE_THREADS;              // [MOMENT_PARTS][MERGE_PAIRS]
  const int b = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  int stretch = static_cast<int>(blockIdx.y), scale = 0, first_row = 0, first_pair = 0;
  for (; stretch >= stretches_of_pairs(p.sizes[scale]); ++scale) {
    stretch -= stretches_of_pairs(p.sizes[scale]);
    first_row += p.sizes[scale], first_pair += p.sizes[scale] * p.sizes[scale];
  }
  const int regions = p.sizes[scale], last = p.chunks - 1;
  const int64_t slice = int64_t(b) * p.chunks, row = slice * p.rows + first_row;

  const int own = thread % MAX_REGIONS;
  double sum = 0;
  if (own < regions)
#pragma unroll 4
    for (int chunk = thread / MAX_REGIONS; chunk < p.chunks; chunk += MEAN_PARTS) {
      const int64_t at = row + int64_t(chunk) * p.rows + own;
      sum += p.sums[at] + (chunk == last ? p.of_last : p.of_whole) * static_cast<double>(p.origins[at]);
    }
  parts_of_means[thread] = sum;
  __syncthreads();
  const auto mean_of = [&](int region) {
    double all = 0;
#pragma unroll
    for (int part = 0; part < MEAN_PARTS; ++part) all += parts_of_means[part * MAX_REGIONS + region];
    return all * p.share_of_all;
  };
  if (stretch == 0 && thread < regions) p.mean[int64_t(b) * p.rows + first_row + thread] = mean_of(thread);

  const int part = thread / MERGE_PAIRS, pair = stretch * MERGE_PAIRS + thread % MERGE_PAIRS;
  const bool inside = pair < regions * regions;
  sum = 0;
  if (inside) {
    const int j = pair / regions, k = pair - j * regions;
    const double mean_j = mean_of(j), mean_k = mean_of(k);
#pragma unroll 4
    for (int chunk = part; chunk < p.chunks; chunk += MOMENT_PARTS) {
      const int64_t at = row + int64_t(chunk) * p.rows;
      const double count = chunk == last ? p.of_last : p.of_whole;
      const double share = chunk == last ? p.share_of_last : p.share_of_whole;
      const double sum_j = p.sums[at + j], sum_k = p.sums[at + k];
      const double step_j = p.origins[at + j] - mean_j + sum_j * share;  // of the chunk's mean from that of all
      const double step_k = p.origins[at + k] - mean_k + sum_k * share;
      sum += p.squares[(slice + chunk) * p.pairs + first_pair + pair] - sum_j * sum_k * share + step_j * step_k * count;
    }
  }
  parts[thread] = sum;
  __syncthreads();
  if (inside && part == 0) {
#pragma unroll
    for (int other = 1; other < MOMENT_PARTS; ++other) sum += parts[other * MERGE_PAIRS + thread];
    p.covariance[int64_t(b) * p.pairs + first_pair + pair] = sum * p.share_of_all;
  }
}
