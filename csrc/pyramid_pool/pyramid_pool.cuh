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

// The V elements of a tile that a thread handles as its `item`-th: they lie side by side.
template <int V, bool channels_last>
static __device__ __forceinline__ void locate_item(int item, int& x, int& c) {
  constexpr int ACROSS = (channels_last ? TILE_C : TILE_X) / V;
  x = channels_last ? item / ACROSS : item % ACROSS * V;
  c = channels_last ? item % ACROSS * V : item / ACROSS;
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
    locate_item<V, channels_last>(item, x, c);
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

  float* row_sums = p.row_sums + static_cast<int64_t>(blockIdx.x) * p.columns * p.channels + first_c;
  for (int pair = thread; pair < p.columns * TILE_C; pair += THREADS) {
    const int bin = pair / TILE_C, c = pair % TILE_C;
    const int begin = max(left[bin] - block.x, 0), end = min(right[bin] - block.x, TILE_X);
    float sum = 0;
    for (int x = begin; x < end; ++x) sum += tile[x * TILE_STRIDE + c];
    if (first_c + c < p.channels) row_sums[static_cast<int64_t>(bin) * p.channels + c] = sum;
  }
}

constexpr int POOL_BINS_CHANNELS = 32;
constexpr int POOL_BINS_SHARED_BYTES = POOL_BINS_CHANNELS * (TILE_REGIONS + 1) * sizeof(float);

// grid (batch * channels / POOL_BINS_CHANNELS, regions / TILE_REGIONS), THREADS threads
template <typename T>
__global__ void pool_bins(const PyramidPoolCuda p) {
  SHARED_BUFFER(shared);
  float* tile = reinterpret_cast<float*>(shared);  // [POOL_BINS_CHANNELS][TILE_REGIONS + 1]
  const int channel_blocks = (p.channels + POOL_BINS_CHANNELS - 1) / POOL_BINS_CHANNELS;
  const int b = static_cast<int>(blockIdx.x) / channel_blocks;
  const int first_c = static_cast<int>(blockIdx.x) % channel_blocks * POOL_BINS_CHANNELS;
  const int first_region = static_cast<int>(blockIdx.y) * TILE_REGIONS, thread = static_cast<int>(threadIdx.x);

  for (int item = thread; item < POOL_BINS_CHANNELS * TILE_REGIONS; item += THREADS) {
    const int c = item % POOL_BINS_CHANNELS, r = item / POOL_BINS_CHANNELS;
    float sum = 0;
    if (first_c + c < p.channels && first_region + r < p.regions) {
      int k = 0, bins = 0, region = first_region + r;
      for (; region >= p.scales[k] * p.scales[k]; ++k) {
        region -= p.scales[k] * p.scales[k];
        bins += p.scales[k];
      }
      const int s = p.scales[k], i = region / s, j = region % s;
      const int top = bin_begin(i, p.height, s), bottom = bin_end(i, p.height, s);
      const int area = (bottom - top) * (bin_end(j, p.width, s) - bin_begin(j, p.width, s));
      const float* from = p.row_sums +
                          (static_cast<int64_t>(b) * p.segments * p.chunks * p.columns + bins + j) * p.channels +
                          first_c + c;
      const int64_t step = static_cast<int64_t>(p.columns) * p.channels;
      for (int e = 0; e < p.segments; ++e)
        for (int chunk = 0; chunk < p.chunks; ++chunk, from += step)
          if (p.cuts[e] >= top && p.cuts[e] < bottom) sum += *from;
      sum /= static_cast<float>(area);
    }
    tile[c * (TILE_REGIONS + 1) + r] = sum;
  }
  __syncthreads();

  T* pooled = static_cast<T*>(p.pooled) + (static_cast<int64_t>(b) * p.channels + first_c) * p.regions + first_region;
  for (int item = thread; item < POOL_BINS_CHANNELS * TILE_REGIONS; item += THREADS) {
    const int r = item % TILE_REGIONS, c = item / TILE_REGIONS;
    if (first_c + c < p.channels && first_region + r < p.regions)
      pooled[static_cast<int64_t>(c) * p.regions + r] = round_to<T>(tile[c * (TILE_REGIONS + 1) + r]);
  }
}

constexpr int SPREAD_ROWS_SHARED_BYTES = TILE_BINS * (TILE_STRIDE + 2) * sizeof(float);

// grid (batch * segments * chunks, channels / TILE_C), THREADS threads
template <typename T, int V, bool channels_last>
__global__ void spread_rows(const PyramidPoolCuda p) {
  SHARED_BUFFER(shared);
  float* grads = reinterpret_cast<float*>(shared);  // [TILE_BINS][TILE_STRIDE]: this segment's share of each column bin
  int* left = reinterpret_cast<int*>(grads + TILE_BINS * TILE_STRIDE);
  int* right = left + TILE_BINS;
  const Place block = locate_block(p);
  const int first_c = static_cast<int>(blockIdx.y) * TILE_C, thread = static_cast<int>(threadIdx.x);
  const int top = p.cuts[block.segment], bottom = p.cuts[block.segment + 1];
  const T* pooled =
      static_cast<const T*>(p.pooled) + (static_cast<int64_t>(block.b) * p.channels + first_c) * p.regions;

  constexpr int ITEMS = TILE_X * TILE_C / V / THREADS, STEP = THREADS / TILE_BINS, CHANNELS = TILE_C / STEP;
  float sum[ITEMS][V] = {};
  for (int first_bin = 0; first_bin < p.columns; first_bin += TILE_BINS) {
    const int bins = min(TILE_BINS, p.columns - first_bin);
    const int n = thread % TILE_BINS, c = thread / TILE_BINS;  // the bin this thread sums, the first of its channels
    float grad[CHANNELS] = {};
    if (n < bins) {
      const Bin at = locate_bin(p, first_bin + n);
      const int begin = bin_begin(at.place, p.width, at.s), end = bin_end(at.place, p.width, at.s);
      if (c == 0) left[n] = begin, right[n] = end;
      for (int i = top * at.s / p.height; i < at.s && bin_begin(i, p.height, at.s) <= top; ++i) {
        const int rows = bin_end(i, p.height, at.s) - bin_begin(i, p.height, at.s);
        const T* region = pooled + at.first_region + i * at.s + at.place;
#pragma unroll
        for (int q = 0; q < CHANNELS; ++q)
          if (first_c + c + q * STEP < p.channels)
            grad[q] +=
                load(region[static_cast<int64_t>(c + q * STEP) * p.regions]) / static_cast<float>(rows * (end - begin));
      }
    }
#pragma unroll
    for (int q = 0; q < CHANNELS; ++q) grads[n * TILE_STRIDE + c + q * STEP] = grad[q];
    __syncthreads();
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      int x, c;
      locate_item<V, channels_last>(thread + item * THREADS, x, c);
      for (int n = 0; n < bins; ++n)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int column = block.x + x + (channels_last ? 0 : v);
          if (left[n] <= column && column < right[n])
            sum[item][v] += grads[n * TILE_STRIDE + c + (channels_last ? v : 0)];
        }
    }
    __syncthreads();
  }

#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    int x, c;
    locate_item<V, channels_last>(thread + item * THREADS, x, c);
    if (block.x + x < p.width && first_c + c < p.channels) {
      Vector<T, V> vector;
#pragma unroll
      for (int v = 0; v < V; ++v) vector.at[v] = round_to<T>(sum[item][v]);
      T* to = static_cast<T*>(p.map) + block.b * p.stride_b + (first_c + c) * p.stride_c + top * p.stride_y +
              (block.x + x) * p.stride_x;
      for (int y = top; y < bottom; ++y, to += p.stride_y) store_vector<V>(to, vector);
    }
  }
}
