// Sums over the positions of a block, of fragments.cuh's rows: what its warps have put into tiles of shared memory is
// transposed by ldmatrix, or summed within each warp. A block adds tile after tile to slices of the workspace.
#pragma once

#include "fragments.cuh"

// Where sums over positions go, numbersᵀ · map: rows of a scale's regions, and of the column of ones after them, if it
// is wanted.
struct SumRows {
  float *regions, *ones;
  int count, pitch;
  // Row g of the eight from j on, the lane's part; null where there is none.
  __device__ __forceinline__ float* at(int j) const {
    const Lane lane = this_lane();
    float* row = j + lane.g < count ? regions + int64_t(j + lane.g) * pitch : j + lane.g == count ? ones : nullptr;
    return row == nullptr ? nullptr : row + 2 * lane.t;
  }
};

// to (+)= numbersᵀ · map over a block's positions, for the tile's channels, which are those of the map from `first` on.
// Each warp takes other stretches of them, and 16 regions at a time: more would cost more registers than there are.
template <typename T, int TILES>
static __device__ __forceinline__ void add_over_positions(const SumRows& to, const RegionTile<TILES>& numbers,
                                                          const MapTile& map, int first, int channels, bool add) {
  constexpr int PITCH = RegionTile<TILES>::PITCH;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane % 16, right = lane / 16;
#pragma unroll 1
  for (int c = this_lane().warp * STRETCH; c < channels; c += WARPS * STRETCH)
#pragma unroll 1
    for (int j = 0; j <= to.count; j += 16) {
      float sums[4][4] = {};
      float* const at[2] = {to.at(j), to.at(j + 8)};
      const auto for_each_pair = [&](auto function) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (at[half] != nullptr)
#pragma unroll
            for (int q = 0; q < 4; ++q) function(at[half] + first + c + 8 * q, &sums[q][2 * half]);
      };
      if (add)
        for_each_pair([](const float* from, float* pair) {
          const Vector<float, 2> both = load_vector<2>(from);
          pair[0] = both.at[0], pair[1] = both.at[1];
        });
#pragma unroll
      for (int k = 0; k < BLOCK_ROWS; k += 16) {
        uint32_t a[4], b[2][4];
        load_a<false>(a, numbers.begin + k * PITCH + j, PITCH);
#pragma unroll
        for (int half = 0; half < 2; ++half) load_matrices<true>(b[half], map.place(k + row, c / 8 + 2 * half + right));
#pragma unroll
        for (int q = 0; q < 4; ++q) multiply_add<T>(sums[q], a, b[q / 2] + q % 2 * 2);
      }
      for_each_pair([](float* to, const float* pair) { store_vector<2>(to, Vector<float, 2>{{pair[0], pair[1]}}); });
    }
}

// to (+)= leftᵀ · right over a block's positions, (regions, regions). Each warp takes other pieces of 16x16.
template <typename T, int TILES>
static __device__ __forceinline__ void add_pairs(float* to, const RegionTile<TILES>& left,
                                                 const RegionTile<TILES>& right, int regions, bool add) {
  constexpr int PITCH = RegionTile<TILES>::PITCH;
  const Lane lane = this_lane();
#pragma unroll 1
  for (int piece = lane.warp; piece < TILES * TILES / 4; piece += WARPS) {
    const int m = piece / (TILES / 2) * 16, n = piece % (TILES / 2) * 16;
    float sums[8] = {};
    const auto for_each_inside = [&](auto function) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int j = m + lane.g + i % 4 / 2 * 8, k = n + i / 4 * 8 + 2 * lane.t + i % 2;
        if (j < regions && k < regions) function(to[j * regions + k], sums[i]);
      }
    };
    if (add) for_each_inside([](float from, float& sum) { sum = from; });
#pragma unroll
    for (int k = 0; k < BLOCK_ROWS; k += 16) {
      uint32_t a[4], b[4];
      load_a<false>(a, left.begin + k * PITCH + m, PITCH);
      load_two_b<true>(b, right.begin + k * PITCH + n, PITCH);
      multiply_add<T>(sums, a, b), multiply_add<T>(sums + 4, a, b + 2);
    }
    for_each_inside([](float& to, float sum) { to = sum; });
  }
}

// to (+)= the sums of a warp's numbers over its positions
template <int TILES>
static __device__ __forceinline__ void add_row_sums(float* to, RegionSums<TILES>& numbers, int regions, bool add) {
  const Lane lane = this_lane_anew();
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i) {
    float sum = numbers[i / 2][i % 2] + numbers[i / 2][2 + i % 2];
#pragma unroll
    for (unsigned lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    const int j = i / 2 * 8 + 2 * lane.t + i % 2;
    if (lane.g == 0 && j < regions) to[j] = add ? to[j] + sum : sum;
  }
}
