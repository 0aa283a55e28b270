// affinity_moments' CUDA kernel for bfloat16 and float16 maps, on tensor cores: affinity_moments.cuh's sums, by the
// rows and products of fragments.cuh. Its least, everything moved once, for B images of C channels a scale, N
// positions, J = sum of s^2 regions and P = sum of s^4 pairs of them:
//
//   sum_moments_mma  moves x, bias, workspace; computes 2*B*N*J*C, B*N*P more
//
// The products of deviations are float64, on tensor cores too: those of 8 regions with 8 others at and above the
// diagonal. A column of ones after the regions' sums the deviations themselves.
#pragma once

#include "affinity_moments.cuh"
#include "fragments.cuh"

constexpr int ORIGIN_BYTES = 512;
static_assert(ORIGIN_BYTES >= MAX_REGIONS * int(sizeof(float)));
// Deviations lie in rows of positions, such that four of eight numbers are in different banks.
constexpr int deviation_pitch(int rows) { return rows + 8; }
constexpr int deviation_bytes(int rows) { return BLOCK_ROWS * deviation_pitch(rows) * int(sizeof(float)); }

// A warp's rows of eight regions, against themselves and all after them: rows w, then 7 - w, then 8 + w, so that all
// warps have about as much to do. function(number of the warp's row, its eight regions, the other eight)
template <int TILES, typename Function>
static __device__ __forceinline__ void for_each_product(Function function) {
  const int warp = this_lane().warp;
#pragma unroll
  for (int turn = 0; turn * WARPS < TILES; ++turn) {
    const int m = turn * WARPS + (turn % 2 == 0 ? warp : WARPS - 1 - warp);
#pragma unroll
    for (int i = 0; i < TILES - turn * WARPS; ++i)
      if (m + i < TILES) function(turn, i, m, m + i);
  }
}

template <typename T, int TILES>
static __device__ __forceinline__ void sum_moments_of_chunk(const AffinityMomentsCuda& p, const Work& work,
                                                            float* origin, unsigned char* place) {
  constexpr int PITCH = deviation_pitch(8 * TILES), TURNS = (TILES + WARPS - 1) / WARPS;
  const Lane lane = this_lane();
  const MapTile map(place, p.padded);
  float* deviations = reinterpret_cast<float*>(place);  // where the map was
  double squares[TURNS][TILES][2] = {};
#pragma unroll 1
  for (int i = 0; i < p.chunk_tiles && work.chunk * p.chunk_tiles + i < p.tiles; ++i) {
    const int first = (work.chunk * p.chunk_tiles + i) * TILE, count = min(TILE, p.positions - first);
    __syncthreads();
    RegionSums<TILES> affinities;
    find_affinities<T, TILES>(affinities, p, work, MapRows(p, p.x, work, first), map, [](int) {});
    if (i == 0 && lane.warp == 0 && lane.g == 0)
      for_each_sum<TILES>(affinities, [&](int half, int j, float a) {
        if (half == 0 && j < work.regions) origin[j] = a;
      });
    __syncthreads();
    const Halves inside = halves_before(count);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 8 * tile + 2 * lane.t;
        const auto deviation = [&](int j, float a) {
          if (!inside.at[half]) return 0.0f;
          return j < work.regions ? a - origin[j] : j == work.regions ? 1.0f : 0.0f;
        };
        store_vector<2>(deviations + (lane.warp * ROWS + lane.g + 8 * half) * PITCH + j,
                        Vector<float, 2>{{deviation(j, affinities[tile][2 * half]),
                                          deviation(j + 1, affinities[tile][2 * half + 1])}});
      }
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < BLOCK_ROWS; n += 4) {
      const float* row = deviations + (n + lane.t) * PITCH + lane.g;
      double own = 0;
      for_each_product<TILES>([&](int turn, int i, int, int k) {
        const double other = row[8 * k];
        if (i == 0) own = other;
        multiply_add(squares[turn][i], own, other);
      });
    }
  }

  const int64_t slice = int64_t(work.b) * p.chunks + work.chunk, row = slice * p.rows + work.first_row;
  double* to = p.squares + slice * p.pairs + work.first_pair;
  for_each_product<TILES>([&](int turn, int i, int m, int k) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int left = 8 * m + lane.g, right = 8 * k + 2 * lane.t + e;
      const double sum = squares[turn][i][e];
      if (left < work.regions && right == work.regions) p.sums[row + left] = sum;
      if (left <= right && right < work.regions)
        to[left * work.regions + right] = to[right * work.regions + left] = sum;
    }
  });
  for (int j = static_cast<int>(threadIdx.x); j < work.regions; j += WARP_THREADS) p.origins[row + j] = origin[j];
}

// grid (batch * scales * chunks), WARP_THREADS threads
template <typename T>
__global__ void __launch_bounds__(WARP_THREADS, BLOCKS) sum_moments_mma(const AffinityMomentsCuda p) {
  SHARED_BUFFER(buffer);
  const Work work = locate_work(p);
  with_region_tiles(work.regions, [&](auto tiles) {
    sum_moments_of_chunk<T, tiles.value>(p, work, reinterpret_cast<float*>(buffer), buffer + ORIGIN_BYTES);
  });
}
