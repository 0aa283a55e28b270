// pyramid_pool's CUDA kernels. The algorithm is the one of apc_kernels/ops/pyramid_pool/triton.py:
//
//   pool_rows    a block sums the rows of one row segment (bins.h), the one read of x, then its columns into the bins
//                of every scale
//   pool_bins    adds up the row segments of every region and divides by its area
//   spread_rows  a block works out the gradient of a row segment's rows once and writes it to each of them
//
// Threads run along whatever lies side by side in memory: channels of channels_last maps, columns of NCHW ones.
//
// Each kernel's least, everything moved once, for B images of C channels and N positions in J = sum of s^2 regions:
//
//   pool_rows    moves x, workspace; computes B*C*N
//   pool_bins    moves workspace, out; computes B*C*J
//   spread_rows  moves grad, grad_x; computes B*C*J
#pragma once

#include "../common/device.cuh"
#include "pyramid_pool_cuda.h"

struct Bin {
  int s, place, first_region;  // its scale, its place in that scale, the first region of that scale
};

static __device__ __forceinline__ Bin locate_bin(const PyramidPoolCuda& p, int bin) {
  int k = 0, first_region = 0;
  while (bin >= p.scales[k]) {
    bin -= p.scales[k];
    first_region += p.scales[k] * p.scales[k];
    ++k;
  }
  return {p.scales[k], bin, first_region};
}

// What blockIdx.x counts: images, row segments, chunks of columns.
struct Place {
  int b, segment, x;
};

static __device__ __forceinline__ Place locate_block(const PyramidPoolCuda& p) {
  const int block = static_cast<int>(blockIdx.x);
  return {block / (p.chunks * p.segments), block / p.chunks % p.segments, block % p.chunks * TILE_X};
}

// The V elements of a tile that a thread handles as its `item`-th: they lie side by side, single ones as in the map.
template <int V, bool channels_last>
static __device__ __forceinline__ void locate_item(const PyramidPoolCuda& p, int item, int& x, int& c) {
  static_assert(TILE_X == TILE_C);
  const int along = item % (TILE_C / V) * V, across = item / (TILE_C / V);
  const bool by_channel = V == 1 ? p.by_channel : channels_last;
  x = by_channel ? across : along;
  c = by_channel ? along : across;
}

constexpr int TILE_STRIDE = TILE_C + 1;  // one apart, so that a column of the tile lies in different banks
static inline APC_HOST_DEVICE int pool_rows_shared_bytes(int columns) {
  return (TILE_X * TILE_STRIDE + 2 * columns) * static_cast<int>(sizeof(float));
}

// grid (batch * segments * chunks, channels / TILE_C), THREADS threads
template <typename T, int V, bool channels_last>
__global__ void pool_rows(const PyramidPoolCuda p) {
  SHARED_BUFFER(shared);
  float* tile = reinterpret_cast<float*>(shared);  // [TILE_X][TILE_STRIDE]
  int* left = reinterpret_cast<int*>(tile + TILE_X * TILE_STRIDE);
  int* right = left + p.columns;
  const Place block = locate_block(p);
  const int first_c = static_cast<int>(blockIdx.y) * TILE_C, thread = static_cast<int>(threadIdx.x);

  for (int bin = thread; bin < p.columns; bin += THREADS) {
    const Bin at = locate_bin(p, bin);
    left[bin] = bin_begin(at.place, p.width, at.s);
    right[bin] = bin_end(at.place, p.width, at.s);
  }
  const int top = p.cuts[block.segment], bottom = p.cuts[block.segment + 1];
  for (int item = thread; item < TILE_X * TILE_C / V; item += THREADS) {
    int x, c;
    locate_item<V, channels_last>(p, item, x, c);
    float sum[V] = {};
    if (block.x + x < p.width && first_c + c < p.channels) {
      const T* from = static_cast<const T*>(p.map) + block.b * p.stride_b + (first_c + c) * p.stride_c +
                      top * p.stride_y + (block.x + x) * p.stride_x;
#pragma unroll 4
      for (int y = top; y < bottom; ++y, from += p.stride_y) {
        const Vector<T, V> vector = load_vector<V>(from);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += load(vector.at[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) tile[channels_last ? x * TILE_STRIDE + c + v : (x + v) * TILE_STRIDE + c] = sum[v];
  }
  __syncthreads();

  float* row_sums = p.row_sums + static_cast<int64_t>(blockIdx.x) * p.columns * p.padded + first_c;
  for (int pair = thread; pair < p.columns * TILE_C; pair += THREADS) {
    const int bin = pair / TILE_C, c = pair % TILE_C;
    const int begin = max(left[bin] - block.x, 0), end = min(right[bin] - block.x, TILE_X);
    float sum = 0;
    for (int x = begin; x < end; ++x) sum += tile[x * TILE_STRIDE + c];
    if (first_c + c < p.padded) row_sums[static_cast<int64_t>(bin) * p.padded + c] = sum;
  }
}

constexpr int POOL_BINS_CHANNELS = 32, POOL_BINS_STRIDE = TILE_REGIONS + 1;

// The row sums that make up a region: `count` of them, a segment or chunk apart.
struct Terms {
  int first, count;
  float area;
};
constexpr int POOL_BINS_SHARED_BYTES =
    POOL_BINS_CHANNELS * POOL_BINS_STRIDE * sizeof(float) + TILE_REGIONS * sizeof(Terms);

static __device__ __forceinline__ Terms find_terms(const PyramidPoolCuda& p, int region) {
  int k = 0, bins = 0;
  for (; region >= p.scales[k] * p.scales[k]; ++k) region -= p.scales[k] * p.scales[k], bins += p.scales[k];
  const int s = p.scales[k], i = region / s, j = region - i * s;
  const int top = bin_begin(i, p.height, s), bottom = bin_end(i, p.height, s);
  int first = 0, end;  // segments
  while (p.cuts[first] < top) ++first;
  for (end = first; p.cuts[end] < bottom;) ++end;
  const int area = (bottom - top) * (bin_end(j, p.width, s) - bin_begin(j, p.width, s));
  return {first * p.chunks * p.columns + bins + j, (end - first) * p.chunks, static_cast<float>(area)};
}

// grid (batch * channels / POOL_BINS_CHANNELS, regions / TILE_REGIONS), THREADS threads
template <typename T>
__global__ void pool_bins(const PyramidPoolCuda p) {
  SHARED_BUFFER(shared);
  float* tile = reinterpret_cast<float*>(shared);  // [POOL_BINS_CHANNELS][POOL_BINS_STRIDE]
  Terms* terms = reinterpret_cast<Terms*>(tile + POOL_BINS_CHANNELS * POOL_BINS_STRIDE);
  const int channel_blocks = (p.channels + POOL_BINS_CHANNELS - 1) / POOL_BINS_CHANNELS;
  const int b = static_cast<int>(blockIdx.x) / channel_blocks;
  const int first_c = static_cast<int>(blockIdx.x) % channel_blocks * POOL_BINS_CHANNELS;
  const int first_region = static_cast<int>(blockIdx.y) * TILE_REGIONS, thread = static_cast<int>(threadIdx.x);

  const int regions = min(TILE_REGIONS, p.regions - first_region);
  if (thread < regions) terms[thread] = find_terms(p, first_region + thread);
  __syncthreads();
  const int64_t image = static_cast<int64_t>(b) * p.segments * p.chunks * p.columns;
  const int64_t step = static_cast<int64_t>(p.columns) * p.padded;
  for (int item = thread; item < regions * (POOL_BINS_CHANNELS / VECTOR); item += THREADS) {
    const int c = item % (POOL_BINS_CHANNELS / VECTOR) * VECTOR, r = item / (POOL_BINS_CHANNELS / VECTOR);
    if (first_c + c < p.padded) {
      const Terms own = terms[r];
      const float* from = p.row_sums + (image + own.first) * p.padded + first_c + c;
      float sum[VECTOR] = {};
#pragma unroll 2
      for (int i = 0; i < own.count; ++i, from += step) {
        const Vector<float, VECTOR> term = load_vector<VECTOR>(from);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) sum[v] += term.at[v];
      }
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) tile[(c + v) * POOL_BINS_STRIDE + r] = sum[v] / own.area;
    }
  }
  __syncthreads();

  const int r = thread % TILE_REGIONS, own_c = thread / TILE_REGIONS;
  if (r >= regions) return;
  const int64_t plane = static_cast<int64_t>(b) * p.channels + first_c + own_c;
  T* to = static_cast<T*>(p.pooled) + plane * p.regions + first_region + r;
  constexpr int STEP = THREADS / TILE_REGIONS;
#pragma unroll
  for (int c = own_c; c < POOL_BINS_CHANNELS; c += STEP, to += STEP * p.regions)
    if (first_c + c < p.channels) *to = round_to<T>(tile[c * POOL_BINS_STRIDE + r]);
}

// What spread_rows keeps in shared memory. The gradient of a row segment's rows changes only where a bin of columns
// begins or ends. The columns between two such places are a *run*: each has its gradient computed once.
struct Spread {
  static constexpr int STRIDE = TILE_C + VECTOR;  // rows start at multiples of 16 bytes
  struct alignas(16) ColumnBin {
    int begin, end, s, region;  // its columns; its scale and its region in the first row of that scale
  };
  float* grads;                          // [TILE_BINS][STRIDE]: this segment's share of each bin
  float* sums;                           // [TILE_X][STRIDE]: of each run
  ColumnBin* bins;                       // [columns]
  uint8_t *is_first, *run_of, *columns;  // [TILE_X]: whether a run begins at a column; a column's run; a run's column
  int* runs;                             // how many there are

  explicit __device__ __forceinline__ Spread(unsigned char* buffer, int all_columns)
      : grads(reinterpret_cast<float*>(buffer)),
        sums(grads + TILE_BINS * STRIDE),
        bins(reinterpret_cast<ColumnBin*>(sums + TILE_X * STRIDE)),
        is_first(reinterpret_cast<uint8_t*>(bins + all_columns)),
        run_of(is_first + TILE_X),
        columns(run_of + TILE_X),
        runs(reinterpret_cast<int*>(columns + TILE_X)) {}
  static APC_HOST_DEVICE int bytes(int all_columns) {
    return (TILE_BINS + TILE_X) * STRIDE * int(sizeof(float)) + all_columns * int(sizeof(ColumnBin)) + 3 * TILE_X +
           int(sizeof(int));
  }
};

// Writes bins, run_of, columns and runs. They are there after the next barrier.
static __device__ __forceinline__ void find_runs(const PyramidPoolCuda& p, const Spread& spread, int first_x) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int bin = thread; bin < p.columns; bin += THREADS) {
    const Bin at = locate_bin(p, bin);
    spread.bins[bin] = {bin_begin(at.place, p.width, at.s), bin_end(at.place, p.width, at.s), at.s,
                        at.first_region + at.place};
  }
  __syncthreads();
  if (thread < TILE_X) {
    bool is_first = thread == 0;
    for (int bin = 0; bin < p.columns; ++bin)
      is_first |= spread.bins[bin].begin == first_x + thread || spread.bins[bin].end == first_x + thread;
    spread.is_first[thread] = is_first;
  }
  __syncthreads();
  if (thread < TILE_X) {
    // Four flags in a word, and as many sums in one: a tile has fewer than 256 runs.
    const uint32_t* flags = reinterpret_cast<const uint32_t*>(spread.is_first);
    uint32_t sums = flags[thread / 4] << (3 - thread % 4) * 8;
    for (int word = 0; word < thread / 4; ++word) sums += flags[word];
    const int runs = static_cast<int>(sums * 0x01010101u >> 24);
    spread.run_of[thread] = static_cast<uint8_t>(runs - 1);
    if (spread.is_first[thread]) spread.columns[runs - 1] = static_cast<uint8_t>(thread);
    if (thread == TILE_X - 1) *spread.runs = runs;
  }
}

// Writes this segment's share of the bins from `first_bin` on. A thread has a bin, and every STEP-th channel.
template <typename T>
static __device__ __forceinline__ void find_shares(const PyramidPoolCuda& p, const Spread& spread, const Place& block,
                                                   int first_c, int first_bin, int bins) {
  constexpr int STEP = THREADS / TILE_BINS, CHANNELS = TILE_C / STEP;
  const int n = static_cast<int>(threadIdx.x) % TILE_BINS, c = static_cast<int>(threadIdx.x) / TILE_BINS;
  if (n >= bins) return;
  const int top = p.cuts[block.segment];
  const T* pooled =
      static_cast<const T*>(p.pooled) + (static_cast<int64_t>(block.b) * p.channels + first_c + c) * p.regions;
  const Spread::ColumnBin bin = spread.bins[first_bin + n];
  float grad[CHANNELS] = {};
  for (int i = top * bin.s / p.height; i < bin.s && bin_begin(i, p.height, bin.s) <= top; ++i) {
    const int rows = bin_end(i, p.height, bin.s) - bin_begin(i, p.height, bin.s);
    const auto area = static_cast<float>(rows * (bin.end - bin.begin));
    const T* region = pooled + bin.region + i * bin.s;
#pragma unroll
    for (int q = 0; q < CHANNELS; ++q)
      if (first_c + c + q * STEP < p.channels)
        grad[q] += load(region[static_cast<int64_t>(q) * STEP * p.regions]) / area;
  }
#pragma unroll
  for (int q = 0; q < CHANNELS; ++q) spread.grads[n * Spread::STRIDE + c + q * STEP] = grad[q];
}

// grid (batch * segments * chunks, channels / TILE_C), THREADS threads
template <typename T, int V, bool channels_last>
__global__ void spread_rows(const PyramidPoolCuda p) {
  SHARED_BUFFER(shared);
  const Spread spread(shared, p.columns);
  const Place block = locate_block(p);
  const int first_c = static_cast<int>(blockIdx.y) * TILE_C, thread = static_cast<int>(threadIdx.x);
  find_runs(p, spread, block.x);
  for (int first_bin = 0; first_bin < p.columns; first_bin += TILE_BINS) {
    const int bins = min(TILE_BINS, p.columns - first_bin);
    find_shares<T>(p, spread, block, first_c, first_bin, bins);
    __syncthreads();
    for (int item = thread; item < *spread.runs * (TILE_C / VECTOR); item += THREADS) {
      const int run = item / (TILE_C / VECTOR), c = item % (TILE_C / VECTOR) * VECTOR;
      const int column = block.x + spread.columns[run];
      float* at = spread.sums + run * Spread::STRIDE + c;
      Vector<float, VECTOR> sum{};
      if (first_bin > 0) sum = load_vector<VECTOR>(at);
      for (int n = 0; n < bins; ++n)
        if (spread.bins[first_bin + n].begin <= column && column < spread.bins[first_bin + n].end) {
          const Vector<float, VECTOR> share = load_vector<VECTOR>(spread.grads + n * Spread::STRIDE + c);
#pragma unroll
          for (int v = 0; v < VECTOR; ++v) sum.at[v] += share.at[v];
        }
      store_vector<VECTOR>(at, sum);
    }
    __syncthreads();
  }

  const int top = p.cuts[block.segment], bottom = p.cuts[block.segment + 1];
#pragma unroll(V == 1 ? 4 : TILE_X * TILE_C / V / THREADS)
  for (int item = thread; item < TILE_X * TILE_C / V; item += THREADS) {
    int x, c;
    locate_item<V, channels_last>(p, item, x, c);
    if (block.x + x < p.width && first_c + c < p.channels) {
      const Vector<uint8_t, channels_last ? 1 : V> runs = load_vector<channels_last ? 1 : V>(spread.run_of + x);
      Vector<T, V> vector;
#pragma unroll
      for (int v = 0; v < V; ++v)
        vector.at[v] =
            round_to<T>(spread.sums[runs.at[channels_last ? 0 : v] * Spread::STRIDE + c + (channels_last ? v : 0)]);
      T* to = static_cast<T*>(p.map) + block.b * p.stride_b + (first_c + c) * p.stride_c + top * p.stride_y +
              (block.x + x) * p.stride_x;
#pragma unroll 4
      for (int y = top; y < bottom; ++y, to += p.stride_y) store_vector<V>(to, vector);
    }
  }
}
