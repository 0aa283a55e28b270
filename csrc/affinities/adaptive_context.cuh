// adaptive_context's CUDA kernels for float32 maps, and merge_slices for all: the formulas are those of
// apc_kernels/ops/affinities/reference.py, the tiles and products those of tiles.cuh. Each kernel's least, everything
// moved once, for B images of C channels a scale, N positions, J = sum of s^2 regions and P = sum of s^4 pairs of them:
//
//   aggregate             moves x, bias, shift, center, workspace, z; computes 4*B*N*J*C
//   sum_region_gradients  moves grad, x, bias, shift, center, workspace; computes 8*B*N*J*C
//   write_x_gradients     moves grad, x, bias, shift, center, linear, quadratic, constant, workspace, grad_x;
//                         computes 6*B*N*J*C, 4*B*N*J*C more with grad, 2*B*N*P more with quadratic
//   merge_slices          moves workspace, grad_regions, grad_shift, grad_bias, slope, slope_moments, grad_weight
//
// aggregate reads x twice for the residual, write_x_gradients x and grad, out of the cache as a rule. Affinities, and
// with them z where a relu needs it, are computed anew in each. Sums over positions: a block adds the tiles of its
// chunk to a slice of the workspace that nobody else touches; merge_slices adds the slices, always in the same order.
#pragma once

#include "tiles.cuh"

static __device__ __forceinline__ int padded_regions(const Work& work) {
  return (work.regions + DEPTH - 1) / DEPTH * DEPTH;
}

// affinities − center, rounded, as the products take them.
static __device__ __forceinline__ void put_centered(const AdaptiveContextCuda& p, const Shared& shared,
                                                    const Work& work, int count,
                                                    Product<MAX_REGIONS, false>& affinities) {
  const float* center = p.center == nullptr ? nullptr : p.center + int64_t(work.b) * p.rows + work.first_row;
  for_each(affinities, [&](int n, int j, float a) {
    const bool inside = n < count && j < work.regions;
    const float centered = inside && center != nullptr ? a - center[j] : a;
    shared.affinities[n * TILE_PITCH + j] = inside ? centered : 0.0f;
  });
}

// shift + (affinities − center)·regions for a chunk of channels, the regions' chunk lying in shared.small.
static __device__ __forceinline__ Product<CHUNK, true> context_of(const AdaptiveContextCuda& p, const Shared& shared,
                                                                  const Work& work, int first_c) {
  Product<CHUNK, true> z;
  if (p.shift != nullptr) {
    const float* shift = p.shift + (int64_t(work.b) * p.num_scales + work.scale) * p.channels + first_c;
    for_each(z, [&](int, int c, float& sum) { sum = first_c + c < p.channels ? shift[c] : 0.0f; });
  }
  z.template add<true>(shared.affinities, TILE_PITCH, shared.small, CHUNK_PITCH, TILE, CHUNK, padded_regions(work));
  return z;
}

static __device__ __forceinline__ const float* packed_regions(const AdaptiveContextCuda& p, const Work& work) {
  return static_cast<const float*>(p.packed_regions) + (int64_t(work.b) * p.rows + work.first_row) * p.padded;
}

// grid (batch * scales * chunks), THREADS threads
template <int V>
__global__ void __launch_bounds__(THREADS, V == 1 ? 2 : 3) aggregate(const AdaptiveContextCuda p) {
  using Access = MapAccess<V>;
  SHARED_BUFFER(buffer);
  const Shared shared(buffer);
  for_each_tile(p, shared, [&](const Work& work, const Tile& tile) {
    const Window x = open_window(p, p.x, work, tile.first, shared.offsets);
    const Window z = open_window(p, p.z, work, tile.first, shared.offsets + TILE);
    __syncthreads();
    Product<MAX_REGIONS, false> affinities = affinities_of<Access>(p, shared, work, x);
    put_centered(p, shared, work, tile.count, affinities);

    const float* regions = packed_regions(p, work);
    Access map;
    if (p.residual) map.fetch(x, 0);
    for (int c = 0; c < p.channels; c += CHUNK) {
      if (p.residual) map.put(x, shared.map);
      put_small(regions, work.regions, p.padded, c, shared.small);
      __syncthreads();
      if (p.residual && c + CHUNK < p.channels) map.fetch(x, c + CHUNK);
      Product<CHUNK, true> product = context_of(p, shared, work, c);
      for_each(product, [&](int n, int channel, float value) {
        if (p.shift != nullptr && value <= 0) value = 0;  // NaN passes
        float& cell = shared.map[n * CHUNK_PITCH + channel];
        cell = p.residual ? value + cell : value;
      });
      __syncthreads();
      Access::write(z, c, shared.map);
      // A thread reads the vectors that it puts next, and this was its block's only tile. Of single numbers x and z may
      // give it different ones.
      if constexpr (V == 1) __syncthreads();
    }
  });
}

// Brings the gradient of z chunk by chunk into shared.map, without what the relu kept back, and the chunk of the
// regions into shared.small. use(first channel) finds them there.
template <typename Access, typename Use>
static __device__ __forceinline__ void for_each_gradient(const AdaptiveContextCuda& p, const Shared& shared,
                                                         const Work& work, const Window& grad, Use use) {
  const float* regions = packed_regions(p, work);
  Access map;
  map.fetch(grad, 0);
  for (int c = 0; c < p.channels; c += CHUNK) {
    map.put(grad, shared.map);
    put_small(regions, work.regions, p.padded, c, shared.small);
    __syncthreads();
    if (c + CHUNK < p.channels) map.fetch(grad, c + CHUNK);
    if (p.shift != nullptr) {
      Product<CHUNK, true> z = context_of(p, shared, work, c);
      for_each(z, [&](int n, int channel, float value) {
        if (value <= 0) shared.map[n * CHUNK_PITCH + channel] = 0.0f;
      });
      __syncthreads();
    }
    use(c);
    __syncthreads();
  }
}

// slice (+)= tileᵀ · shared.map, the tile lying in shared.affinities.
static __device__ __forceinline__ void add_to_matrix_slice(const AdaptiveContextCuda& p, const Shared& shared,
                                                           const Work& work, const Tile& tile, int first_c) {
  const int64_t row = (int64_t(work.b) * p.chunks + work.chunk) * p.rows + work.first_row;
  float* slice = p.matrix_slices + row * p.padded + first_c;
  Product<CHUNK, true> sums;
  if (!tile.first_of_chunk) load_sums(sums, slice, p.padded, work.regions, CHUNK);
  sums.add<false>(shared.affinities, TILE_PITCH, shared.map, CHUNK_PITCH, work.regions, CHUNK, TILE);
  store_sums(sums, slice, p.padded, work.regions, CHUNK);
}

static __device__ __forceinline__ void add_to(float* at, float sum, bool first) { *at = first ? sum : *at + sum; }

// slice (+)= sums over the positions of `function` of a thread's affinities and gradients. Begins and ends with shared
// memory free.
template <typename Function>
static __device__ __forceinline__ void add_row_sums(const AffinitiesCuda& p, const Shared& shared, const Work& work,
                                                    const Tile& tile, float* slices,
                                                    const Product<MAX_REGIONS, false>& affinities,
                                                    const Product<MAX_REGIONS, false>& gradients, Function function) {
  using Sums = Product<MAX_REGIONS, false>;
#pragma unroll
  for (int i = 0; i < Sums::COUNT; ++i) {
    const bool inside = Sums::row(i) < tile.count && Sums::column(i) < work.regions;
    shared.scratch[Sums::row(i) * TILE_PITCH + Sums::column(i)] =
        inside ? function(affinities.sums[i], gradients.sums[i]) : 0.0f;
  }
  __syncthreads();
  const int j = static_cast<int>(threadIdx.x) % MAX_REGIONS, part = static_cast<int>(threadIdx.x) / MAX_REGIONS;
  if (j < work.regions) {
    float sum = 0;
#pragma unroll 4
    for (int n = part * (TILE / ROW_PARTS); n < (part + 1) * (TILE / ROW_PARTS); ++n)
      sum += shared.scratch[n * TILE_PITCH + j];
    const int64_t slice = (int64_t(work.b) * p.chunks + work.chunk) * ROW_PARTS + part;
    add_to(slices + slice * p.rows + work.first_row + j, sum, tile.first_of_chunk);
  }
  __syncthreads();
}

// grid (batch * scales * chunks), THREADS threads
template <int V>
__global__ void __launch_bounds__(THREADS, 2) sum_region_gradients(const AdaptiveContextCuda p) {
  using Access = MapAccess<V>;
  SHARED_BUFFER(buffer);
  const Shared shared(buffer);
  for_each_tile(p, shared, [&](const Work& work, const Tile& tile) {
    const Window x = open_window(p, p.x, work, tile.first, shared.offsets);
    const Window grad = open_window(p, p.grad, work, tile.first, shared.offsets + TILE);
    __syncthreads();
    Product<MAX_REGIONS, false> affinities = affinities_of<Access>(p, shared, work, x), gradients;
    put_centered(p, shared, work, tile.count, affinities);
    for_each_gradient<Access>(p, shared, work, grad, [&](int first_c) {
      add_map_by_small(gradients, shared, work);
      add_to_matrix_slice(p, shared, work, tile, first_c);
      const int c = static_cast<int>(threadIdx.x) % CHUNK, part = static_cast<int>(threadIdx.x) / CHUNK;
      if (first_c + c < p.channels) {
        float sum = 0;
#pragma unroll 4
        for (int n = part * (TILE / SHIFT_PARTS); n < (part + 1) * (TILE / SHIFT_PARTS); ++n)
          sum += shared.map[n * CHUNK_PITCH + c];
        const int64_t slice = (int64_t(work.b) * p.chunks + work.chunk) * SHIFT_PARTS + part;
        add_to(p.shift_slices + (slice * p.num_scales + work.scale) * p.channels + first_c + c, sum,
               tile.first_of_chunk);
      }
    });

    for_each(affinities, [&](int, int, float& a) { a *= 1 - a; });  // the slope from here on
    add_row_sums(p, shared, work, tile, p.bias_slices, affinities, gradients, [](float a, float d) { return a * d; });
    add_row_sums(p, shared, work, tile, p.slope_slices, affinities, gradients, [](float a, float) { return a; });
    for_each(affinities, [&](int n, int j, float a) {
      shared.matrix[n * TILE_PITCH + j] = n < tile.count && j < work.regions ? a : 0.0f;
    });
    __syncthreads();
    float* slice = p.pair_slices + (int64_t(work.b) * p.chunks + work.chunk) * p.pairs + work.first_pair;
    const auto inside = [&](int j, int k) { return j < work.regions && k < work.regions; };
    Product<MAX_REGIONS, true> moments;
    for_each(moments, [&](int j, int k, float& sum) {
      sum = inside(j, k) && !tile.first_of_chunk ? slice[j * work.regions + k] : 0.0f;
    });
    moments.template add<false>(shared.matrix, TILE_PITCH, shared.affinities, TILE_PITCH, work.regions, work.regions,
                                TILE);
    for_each(moments, [&](int j, int k, float sum) {
      if (inside(j, k)) slice[j * work.regions + k] = sum;
    });
  });
}

// grid (batch * scales * chunks), THREADS threads
template <int V>
__global__ void __launch_bounds__(THREADS, 2) write_x_gradients(const AdaptiveContextCuda p) {
  using Access = MapAccess<V>;
  using Sums = Product<MAX_REGIONS, false>;
  SHARED_BUFFER(buffer);
  const Shared shared(buffer);
  for_each_tile(p, shared, [&](const Work& work, const Tile& tile) {
    const Window x = open_window(p, p.x, work, tile.first, shared.offsets);
    const Window grad_x = open_window(p, p.grad_x, work, tile.first, shared.offsets + TILE);
    const Window grad = open_window(p, p.grad, work, tile.first, shared.offsets + 2 * TILE);
    __syncthreads();
    Sums affinities = affinities_of<Access>(p, shared, work, x), gradients;
    put_centered(p, shared, work, tile.count, affinities);
    // The small terms first: added to large sums, a constant would be rounded the same way at every position.
    if (p.linear != nullptr) {
      const float* linear = p.linear + int64_t(work.b) * p.rows + work.first_row;
      const float* quadratic = p.quadratic + int64_t(work.b) * p.pairs + work.first_pair;
      for_each(gradients, [&](int, int, float& d) { d = 0.0f; });
      for (int item = static_cast<int>(threadIdx.x); item < MAX_REGIONS * MAX_REGIONS; item += THREADS) {
        const int j = item / MAX_REGIONS, k = item % MAX_REGIONS;
        shared.matrix[j * TILE_PITCH + k] =
            (j < work.regions && k < work.regions ? quadratic[j * work.regions + k] : 0.0f);
      }
      __syncthreads();
      gradients.template add<true>(shared.affinities, TILE_PITCH, shared.matrix, TILE_PITCH, TILE, work.regions,
                                   padded_regions(work));
      for_each(gradients, [&](int, int j, float& d) { d = j < work.regions ? d + linear[j] : 0.0f; });
      __syncthreads();
    }
    if (p.grad.data != nullptr)
      for_each_gradient<Access>(p, shared, work, grad, [&](int) { add_map_by_small(gradients, shared, work); });
#pragma unroll
    for (int i = 0; i < Sums::COUNT; ++i)
      gradients.sums[i] *= affinities.sums[i] * (1 - affinities.sums[i]);  // of logits
    add_row_sums(p, shared, work, tile, p.bias_slices, affinities, gradients, [](float, float d) { return d; });
    for_each(gradients, [&](int n, int j, float d) {
      shared.affinities[n * TILE_PITCH + j] = n < tile.count && j < work.regions ? d : 0.0f;
    });

    const float* weight = static_cast<const float*>(p.packed_weight) + work.first_row * int64_t(p.padded);
    const int64_t channel = (int64_t(work.b) * p.num_scales + work.scale) * p.channels;
    Access map;
    map.fetch(x, 0);
    for (int c = 0; c < p.channels; c += CHUNK) {
      map.put(x, shared.map);
      put_small(weight, work.regions, p.padded, c, shared.small);
      __syncthreads();
      if (p.residual) map.fetch(grad, c);
      add_to_matrix_slice(p, shared, work, tile, c);
      Product<CHUNK, true> product;
      if (p.constant != nullptr)
        for_each(product,
                 [&](int, int k, float& sum) { sum = c + k < p.channels ? p.constant[channel + c + k] : 0.0f; });
      product.template add<true>(shared.affinities, TILE_PITCH, shared.small, CHUNK_PITCH, TILE, CHUNK,
                                 padded_regions(work));
      __syncthreads();
      if (p.residual) {
        map.put(grad, shared.map);
        __syncthreads();
      }
      if (c + CHUNK < p.channels) map.fetch(x, c + CHUNK);
      for_each(product, [&](int n, int k, float sum) {
        float& cell = shared.map[n * CHUNK_PITCH + k];
        if (p.residual) sum += cell;
        cell = sum;
      });
      __syncthreads();
      Access::write(grad_x, c, shared.map);
      __syncthreads();
    }
  });
}

// (results, slices, rows, pitch) -> (results, rows, columns)
struct Slices {
  const float* from;
  float* to;
  int results, slices, rows, pitch, columns;
  bool vectors = false;  // whether a thread takes VECTOR columns: rows start at multiples of as many numbers
  int across = 0;        // blocks of a row
  int blocks = 0;        // of all rows
};

constexpr int MAX_MERGES = 5, MERGE_LANES = 32, MERGE_PARTS = 4;
struct MergeCuda {
  Slices of[MAX_MERGES];
};
constexpr int MERGE_SHARED_BYTES = VECTOR * MERGE_LANES * MERGE_PARTS * sizeof(float);

// V columns of one row of one result from `lane` * V on: each part takes every MERGE_PARTS-th slice, the first one adds
// the parts up.
template <int V>
static __device__ __forceinline__ void merge_columns(const Slices& s, int block, float* parts) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % MERGE_LANES, part = thread / MERGE_LANES;
  const int line = block / s.across, result = line / s.rows, row = line - result * s.rows;
  const int column = ((block - line * s.across) * MERGE_LANES + lane) * V;
  const bool inside = column < s.columns;
  Vector<float, V> sum{};
  if (inside) {
    const int64_t step = int64_t(s.rows) * s.pitch;
    const float* from = s.from + (int64_t(result) * s.slices + part) * step + int64_t(row) * s.pitch + column;
#pragma unroll 8
    for (int slice = part; slice < s.slices; slice += MERGE_PARTS, from += MERGE_PARTS * step) {
      const Vector<float, V> own = load_vector<V>(from);
#pragma unroll
      for (int v = 0; v < V; ++v) sum.at[v] += own.at[v];
    }
  }
  store_vector<V>(parts + thread * V, sum);
  __syncthreads();
  if (inside && part == 0) {
#pragma unroll
    for (int other = 1; other < MERGE_PARTS; ++other) {
      const Vector<float, V> more = load_vector<V>(parts + (other * MERGE_LANES + lane) * V);
#pragma unroll
      for (int v = 0; v < V; ++v) sum.at[v] += more.at[v];
    }
    store_vector<V>(s.to + int64_t(line) * s.columns + column, sum);
  }
}

// grid (blocks of all merges), MERGE_LANES * MERGE_PARTS threads
static __global__ void merge_slices(const MergeCuda p) {
  SHARED_BUFFER(shared);
  float* parts = reinterpret_cast<float*>(shared);  // [MERGE_PARTS][MERGE_LANES][VECTOR]
  int block = static_cast<int>(blockIdx.x), merge = 0;
  while (block >= p.of[merge].blocks) block -= p.of[merge++].blocks;
  const Slices& s = p.of[merge];
  if (s.vectors)
    merge_columns<VECTOR>(s, block, parts);
  else
    merge_columns<1>(s, block, parts);
}
