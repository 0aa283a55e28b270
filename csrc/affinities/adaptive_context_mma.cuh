// adaptive_context's CUDA kernels for bfloat16 and float16 maps, on tensor cores: adaptive_context.cuh's formulas, the
// rows and products of fragments.cuh. Each kernel's least, everything moved once, for B images of C channels a scale,
// N positions, J = sum of s^2 regions and P = sum of s^4 pairs of them:
//
//   aggregate_mma             moves x, bias, center, workspace, z; computes 4*B*N*J*C
//   sum_region_gradients_mma  moves grad, x, bias, center, workspace; computes 8*B*N*J*C
//   write_x_gradients_mma     moves grad, x, bias, center, linear, quadratic, workspace, grad_x;
//                             computes 6*B*N*J*C, 4*B*N*J*C more with grad, 2*B*N*P more with quadratic
//
// In maps of up to RESIDENT channels a scale, x stays in shared memory until it is added or multiplied again; larger
// ones are brought there part by part, twice, out of the cache as a rule, and grad is read twice where it is added.
// Sums over positions: a block adds the tiles of its chunk to a slice of the workspace that nobody else touches, as
// adaptive_context.cuh's do.
#pragma once

#include "adaptive_context.cuh"
#include "position_sums.cuh"

// affinities − center, rounded, as the products take them; a column of ones after the regions', with which sums over
// positions count the map itself; zeros for positions from `count` on.
template <typename T, int TILES>
static __device__ __forceinline__ RegionFragments<TILES> round_centered(const AdaptiveContextCuda& p, const Work& work,
                                                                        const RegionSums<TILES>& affinities,
                                                                        int count) {
  const Halves inside = halves_before(count);
  const float* center = p.center == nullptr ? nullptr : p.center + int64_t(work.b) * p.rows + work.first_row;
  RegionFragments<TILES> centered;
  centered.template round<T>(affinities, [&](int half, int j, float a) {
    if (!inside.at[half]) return 0.0f;
    if (j >= work.regions) return j == work.regions ? 1.0f : 0.0f;
    return center == nullptr ? a : a - center[j];
  });
  return centered;
}

// The lane's part of a padded vector of the scale's channels, null where there is none.
static __device__ __forceinline__ const float* own_part(const AdaptiveContextCuda& p, const Work& work,
                                                        const float* vectors) {
  if (vectors == nullptr) return nullptr;
  return vectors + (int64_t(work.b) * p.num_scales + work.scale) * p.padded + 8 * this_lane().t;
}

static __device__ __forceinline__ int64_t region_row(const AdaptiveContextCuda& p, const Work& work) {
  return int64_t(work.b) * p.fragment_rows + work.first_fragment_row;
}

template <typename T, int TILES>
static __device__ __forceinline__ void aggregate_tile(const AdaptiveContextCuda& p, const Work& work,
                                                      const MapTile& tile) {
  const MapRows x(p, p.x, work, work.chunk * BLOCK_ROWS), z(p, p.z, work, work.chunk * BLOCK_ROWS);
  RegionSums<TILES> affinities;
  find_affinities<T, TILES>(affinities, p, work, x, tile, [](int) {});
  const RegionFragments<TILES> centered = round_centered<T, TILES>(p, work, affinities, BLOCK_ROWS);

  const PackedPairs regions(p.region_pairs, region_row(p, work), 8 * TILES, p.padded);
  const float* shift = own_part(p, work, p.padded_shift);
  const float least = shift == nullptr ? -INFINITY : 0.0f;  // the relu's
  for_each_part(p, [&](int first, int channels) {
    if (p.residual && p.channels > RESIDENT) tile.fetch(x, first, channels);
#pragma unroll 1
    for (int c = 0; c < channels; c += STRETCH) {
      float sums[4][4];
      add_over_regions<T, TILES>(sums, centered, regions, first + c, shift == nullptr ? nullptr : shift + first + c);
      RawRows rows{};
      if (p.residual) rows = tile.read(c);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t& pair = rows.at[i / 4].at[i % 4];
        float lower = larger(sums[i % 4][i / 4 * 2], least), upper = larger(sums[i % 4][i / 4 * 2 + 1], least);
        if (p.residual) lower += lower_of<T>(pair), upper += upper_of<T>(pair);
        pair = round_pair<T>(lower, upper);
      }
      z.write(first + c, rows);
    }
  });
}

// grid (batch * scales * chunks), WARP_THREADS threads
template <typename T>
__global__ void __launch_bounds__(WARP_THREADS, BLOCKS) aggregate_mma(const AdaptiveContextCuda p) {
  SHARED_BUFFER(buffer);
  const Work work = locate_work(p);
  with_region_tiles(work.regions,
                    [&](auto tiles) { aggregate_tile<T, tiles.value>(p, work, MapTile(buffer, p.padded)); });
}

// The gradient of z without what the relu kept back, for a stretch of channels: the lane's vectors become those of the
// gradient of (affinities − center)·regions.
template <typename T, int TILES>
struct Relu {
  const RegionFragments<TILES>& centered;
  PackedPairs regions;
  const float* shift;

  __device__ __forceinline__ Relu(const AdaptiveContextCuda& p, const Work& work,
                                  const RegionFragments<TILES>& centered)
      : centered(centered),
        regions(p.region_pairs, region_row(p, work), 8 * TILES, p.padded),
        shift(own_part(p, work, p.padded_shift)) {}

  __device__ __forceinline__ void keep_back(RawRows& rows, int c) const {
    if (shift == nullptr) return;
    float z[4][4];
    add_over_regions<T, TILES>(z, centered, regions, c, shift + c);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const auto kept = [&](int i) { return (z[q][i] <= 0 ? 0u : 0xffffu) | (z[q][i + 1] <= 0 ? 0u : 0xffff0000u); };
      rows.at[0].at[q] &= kept(0), rows.at[1].at[q] &= kept(2);
    }
  }
};

template <typename T, int TILES>
static __device__ __forceinline__ void sum_region_gradients_of_tile(const AdaptiveContextCuda& p, const Work& work,
                                                                    const Tile& tile, const MapTile& map,
                                                                    const RegionTile<TILES>& numbers) {
  const MapRows x(p, p.x, work, tile.first), grad(p, p.grad, work, tile.first);
  const bool resident = p.channels <= RESIDENT;
  RegionSums<TILES> affinities, gradients = {};
  find_affinities<T, TILES>(affinities, p, work, x, map, [&](int c) {
    if (resident) map.begin_fetch(grad, 0, c);  // no one else reads what lies there before the next barrier
  });
  if (resident && p.vectors) wait_for_copies();

  RegionFragments<TILES> centered = round_centered<T, TILES>(p, work, affinities, tile.count);
  centered.put(numbers);
  const Relu<T, TILES> relu(p, work, centered);
  const PackedRows regions(p.packed_regions, region_row(p, work), 8 * TILES, p.padded);
  const int64_t slice = int64_t(work.b) * p.chunks + work.chunk;
  const SumRows sums{p.matrix_slices + (slice * p.rows + work.first_row) * p.padded,
                     p.shift_slices + (slice * p.num_scales + work.scale) * p.padded, work.regions, p.padded};
  for_each_part(p, [&](int first, int channels) {
    if (!resident) map.fetch(grad, first, channels);
#pragma unroll 1
    for (int c = 0; c < channels; c += STRETCH) {
      RawRows rows = map.read(c);
      relu.keep_back(rows, first + c);
      map.write(c, rows);
      add_over_channels<T, TILES>(gradients, rows, regions, first + c);
    }
    __syncthreads();
    add_over_positions<T, TILES>(sums, numbers, map, first, channels, !tile.first_of_chunk);
    __syncthreads();
  });

  // What follows a block's sums over channels: sums of the affinities' slopes.
  const Halves inside = halves_before(tile.count);
  const int64_t part = (slice * ROW_PARTS + this_lane().warp) * p.rows + work.first_row;
#pragma unroll
  for (int i = 0; i < 4 * TILES; ++i) {
    float &a = affinities[i / 4][i % 4], &d = gradients[i / 4][i % 4];
    a = inside.at[i % 4 / 2] ? a * (1 - a) : 0.0f;
    d = inside.at[i % 4 / 2] ? a * d : 0.0f;
  }
  add_row_sums<TILES>(p.bias_slices + part, gradients, work.regions, !tile.first_of_chunk);
  add_row_sums<TILES>(p.slope_slices + part, affinities, work.regions, !tile.first_of_chunk);
  const RegionTile<TILES> slopes{reinterpret_cast<uint16_t*>(map.begin)};
  RegionFragments<TILES> rounded;
  rounded.template round<T>(affinities, [](int, int, float a) { return a; });
  rounded.put(slopes);
  __syncthreads();
  add_pairs<T, TILES>(p.pair_slices + slice * p.pairs + work.first_pair, slopes, numbers, work.regions,
                      !tile.first_of_chunk);
}

// grid (batch * scales * chunks), WARP_THREADS threads
template <typename T>
__global__ void __launch_bounds__(WARP_THREADS, BLOCKS) sum_region_gradients_mma(const AdaptiveContextCuda p) {
  SHARED_BUFFER(buffer);
  const MapTile map(buffer + HEADER_BYTES, p.padded);
  auto* numbers = reinterpret_cast<uint16_t*>(map.begin + map.bytes());
  for_each_tile_of(p, *reinterpret_cast<Header*>(buffer), [&](const Work& work, const Tile& tile) {
    with_region_tiles(work.regions,
                      [&](auto tiles) { sum_region_gradients_of_tile<T, tiles.value>(p, work, tile, map, {numbers}); });
  });
}

// The largest of |from[0]|, ..., |from[count - 1]|, or 1 where all are 0, for all threads of a block. Has a barrier.
static __device__ __forceinline__ float largest_of(const float* from, int count, float* of_warps) {
  float largest = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
    largest = fmaxf(largest, fabsf(from[i]));
  for (unsigned lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) largest = fmaxf(largest, of_warps[warp]);
  return largest == 0.0f ? 1.0f : largest;
}

// gradients = linear + (affinities − center)·quadraticᵀ, the matrix relative to its largest number: float16 holds
// neither a mean's gradients over many positions nor those of tiny variances. Begins and ends with `place` free.
template <typename T, int TILES>
static __device__ __forceinline__ void find_moment_gradients(RegionSums<TILES>& gradients, const AdaptiveContextCuda& p,
                                                             const Work& work, const RegionFragments<TILES>& centered,
                                                             const RegionTile<TILES>& place, float* of_warps) {
  constexpr int ROWS_AND_COLUMNS = 8 * TILES, PITCH = RegionTile<TILES>::PITCH;
  const float* linear = p.linear + int64_t(work.b) * p.rows + work.first_row;
  const float* quadratic = p.quadratic + int64_t(work.b) * p.pairs + work.first_pair;
  const float largest = largest_of(quadratic, work.regions * work.regions, of_warps);
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < ROWS_AND_COLUMNS * ROWS_AND_COLUMNS / 2; item += WARP_THREADS) {
    const int j = item / (ROWS_AND_COLUMNS / 2), k = item % (ROWS_AND_COLUMNS / 2) * 2;
    const auto number = [&](int k) {
      return j < work.regions && k < work.regions ? quadratic[j * work.regions + k] / largest : 0.0f;
    };
    *reinterpret_cast<uint32_t*>(place.begin + j * PITCH + k) = round_pair<T>(number(k), number(k + 1));
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < TILES / 2; ++k)
#pragma unroll
    for (int m = 0; m < TILES / 2; ++m) {
      uint32_t b[4];
      load_two_b<false>(b, place.begin + 16 * m * PITCH + 16 * k, PITCH);
      multiply_add<T>(gradients[2 * m], centered.a[k], b);
      multiply_add<T>(gradients[2 * m + 1], centered.a[k], b + 2);
    }
  for_each_sum<TILES>(gradients, [&](int, int j, float& d) { d = j < work.regions ? d * largest + linear[j] : 0.0f; });
  __syncthreads();
}

template <typename T, int TILES>
static __device__ __forceinline__ void write_x_gradients_of_tile(const AdaptiveContextCuda& p, const Work& work,
                                                                 const Tile& tile, const MapTile& map,
                                                                 const RegionTile<TILES>& numbers, float* of_warps) {
  const MapRows x(p, p.x, work, tile.first), grad(p, p.grad, work, tile.first);
  const bool has_grad = p.grad.data != nullptr;
  RegionSums<TILES> affinities, gradients = {};
  find_affinities<T, TILES>(affinities, p, work, x, map, [](int) {});
  const RegionFragments<TILES> centered = round_centered<T, TILES>(p, work, affinities, tile.count);
  // The small terms first: added to large sums, a constant would be rounded the same way at every position.
  if (p.linear != nullptr) find_moment_gradients<T, TILES>(gradients, p, work, centered, numbers, of_warps);
  if (has_grad) {
    const Relu<T, TILES> relu(p, work, centered);
    const PackedRows regions(p.packed_regions, region_row(p, work), 8 * TILES, p.padded);
#pragma unroll 1
    for (int c = 0; c < p.channels; c += STRETCH) {
      RawRows rows = grad.read(c);
      relu.keep_back(rows, c);
      add_over_channels<T, TILES>(gradients, rows, regions, c);
    }
  }
  const Halves inside = halves_before(tile.count);
#pragma unroll
  for (int i = 0; i < 4 * TILES; ++i) {
    const float a = affinities[i / 4][i % 4];
    float& d = gradients[i / 4][i % 4];
    d = inside.at[i % 4 / 2] ? a * (1 - a) * d : 0.0f;  // of logits
  }
  const int64_t slice = int64_t(work.b) * p.chunks + work.chunk;
  add_row_sums<TILES>(p.bias_slices + (slice * ROW_PARTS + this_lane().warp) * p.rows + work.first_row, gradients,
                      work.regions, !tile.first_of_chunk);
  RegionFragments<TILES> rounded;
  rounded.template round<T>(gradients, [&](int, int j, float d) { return j < work.regions ? d : 0.0f; });
  rounded.put(numbers);

  const PackedPairs weight(p.weight_pairs, work.first_fragment_row, 8 * TILES, p.padded);
  const float* constant = own_part(p, work, p.padded_constant);
  const MapRows grad_x(p, p.grad_x, work, tile.first);
  const SumRows sums{p.matrix_slices + (slice * p.rows + work.first_row) * p.padded, nullptr, work.regions, p.padded};
  for_each_part(p, [&](int first, int channels) {
    if (first > 0) __syncthreads();
    if (p.channels > RESIDENT) map.fetch(MapRows(p, p.x, work, tile.first), first, channels);
#pragma unroll 1
    for (int c = first; c < first + channels; c += STRETCH) {
      float products[4][4];
      add_over_regions<T, TILES>(products, rounded, weight, c, constant == nullptr ? nullptr : constant + c);
      RawRows rows{};
      if (has_grad && p.residual) rows = grad.read(c);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t& pair = rows.at[i / 4].at[i % 4];
        pair = round_pair<T>(products[i % 4][i / 4 * 2] + lower_of<T>(pair),
                             products[i % 4][i / 4 * 2 + 1] + upper_of<T>(pair));
      }
      grad_x.write(c, rows);
    }
    __syncthreads();
    add_over_positions<T, TILES>(sums, numbers, map, first, channels, !tile.first_of_chunk);
  });
}

// grid (batch * scales * chunks), WARP_THREADS threads
template <typename T>
__global__ void __launch_bounds__(WARP_THREADS, BLOCKS) write_x_gradients_mma(const AdaptiveContextCuda p) {
  SHARED_BUFFER(buffer);
  const MapTile map(buffer + HEADER_BYTES, p.padded);
  auto* numbers = reinterpret_cast<uint16_t*>(map.begin + map.bytes());
  Header& header = *reinterpret_cast<Header*>(buffer);
  for_each_tile_of(p, header, [&](const Work& work, const Tile& tile) {
    with_region_tiles(work.regions, [&](auto tiles) {
      write_x_gradients_of_tile<T, tiles.value>(p, work, tile, map, {numbers}, header.of_warps);
    });
  });
}
