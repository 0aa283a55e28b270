// Tiles of float32 maps in shared memory, and the products between them.
//
// A block works on one scale of one image, on tiles of TILE positions. In shared memory lie a chunk of the map's
// channels at these positions, the same chunk of a small matrix with a row for each region (weight, regions), and a
// tile of positions x regions (affinities, their gradients). Whatever the operation, there are three products:
//
//   map · smallᵀ     sums over channels     logits, gradients of affinities
//   tile · small     sums over regions      what every position is given
//   tileᵀ · map      sums over positions    gradients of the small matrices
//
// Whatever lies past the end (positions, channels, regions) is zero in shared memory. Before the products pack_rows
// pads the rows of the small matrices; its least, everything moved once:
//
//   pack_rows  moves weight, regions, workspace
#pragma once

#include <cmath>

#include "affinities.cuh"

constexpr int VECTOR = 4;  // numbers in 16 bytes
// Rows in shared memory lie 16 bytes further apart than they are long: eight of them start in different banks.
constexpr int CHUNK_PITCH = CHUNK + VECTOR, TILE_PITCH = TILE + VECTOR;
static_assert(TILE == MAX_REGIONS);  // a tile's rows are as long, whether they run over positions or regions

// Where the tile of a map lies in global memory.
struct Window {
  const MapCuda& map;
  float* data;             // of the image, first channel of the scale
  const int64_t* offsets;  // of the tile's positions, in shared memory; -1 past the end
  int channels;
};

// Writes the offsets: they are there after the next barrier, which also ends whatever the tile before was read for.
static __device__ __forceinline__ Window open_window(const AffinitiesCuda& p, const MapCuda& map, const Work& work,
                                                     int first, int64_t* offsets) {
  if (threadIdx.x < TILE && map.data != nullptr) {
    const int n = first + static_cast<int>(threadIdx.x);
    offsets[threadIdx.x] = n < p.positions ? n / map.width * map.stride_y + n % map.width * map.stride_x : -1;
  }
  float* data = static_cast<float*>(map.data) + work.b * map.stride_b + int64_t(work.scale) * p.channels * map.stride_c;
  return {map, data, offsets, p.channels};
}

// How a chunk of a map is read and written: in vectors of V along channels. Where not every map of a call has such
// vectors, V is 1, and threads run along what lies side by side in each map.
template <int V>
struct MapAccess {
  static constexpr int ITEMS = TILE * CHUNK / V / THREADS;

  // function(i, where in shared memory, where in global memory or null past the end) for each of a thread's vectors.
  template <typename Function>
  static __device__ __forceinline__ void for_each_vector(const Window& window, int first_c, Function function) {
    const bool by_channel = V > 1 || window.map.by_channel;
    const int64_t stride_c = V > 1 ? 1 : window.map.stride_c;
#pragma unroll(V == 1 ? 4 : ITEMS)
    for (int i = 0; i < ITEMS; ++i) {
      const int item = static_cast<int>(threadIdx.x) + i * THREADS;
      const int n = by_channel ? item / (CHUNK / V) : item % TILE,
                c = by_channel ? item % (CHUNK / V) * V : item / TILE;
      const bool inside = window.offsets[n] >= 0 && first_c + c < window.channels;
      function(i, n * CHUNK_PITCH + c, inside ? window.data + window.offsets[n] + (first_c + c) * stride_c : nullptr);
    }
  }

  // A chunk on its way from global to shared memory. Vectors are fetched before the products of the chunk before;
  // single numbers, of which there are too many for a thread's registers, when they are put.
  static constexpr bool AHEAD = V > 1;
  Vector<float, V> items[AHEAD ? ITEMS : 1];
  int first_c;

  __device__ __forceinline__ void fetch(const Window& window, int first_channel) {
    first_c = first_channel;
    if constexpr (AHEAD)
      for_each_vector(window, first_c, [&](int i, int, const float* from) { items[i] = read(from); });
  }

  __device__ __forceinline__ void put(const Window& window, float* tile) const {
    for_each_vector(window, first_c, [&](int i, int place, const float* from) {
      if constexpr (AHEAD)
        store_vector<V>(tile + place, items[i]);
      else
        store_vector<V>(tile + place, read(from));
    });
  }

  static __device__ __forceinline__ void write(const Window& window, int first_c, const float* tile) {
    for_each_vector(window, first_c, [&](int, int place, float* to) {
      if (to != nullptr) store_vector<V>(to, load_vector<V>(tile + place));
    });
  }

 private:
  static __device__ __forceinline__ Vector<float, V> read(const float* from) {
    return from == nullptr ? Vector<float, V>{} : load_vector<V>(from);
  }
};

// A chunk of a small matrix from its packed copy: whole vectors wherever it ends, zeros for rows past the end. It comes
// out of the cache; fetching it ahead as well would cost more registers than there are.
static __device__ __forceinline__ void put_small(const float* rows, int regions, int padded, int first_c, float* tile) {
  constexpr int ACROSS = CHUNK / VECTOR;
#pragma unroll
  for (int i = 0; i < MAX_REGIONS * ACROSS / THREADS; ++i) {
    const int item = static_cast<int>(threadIdx.x) + i * THREADS, j = item / ACROSS, c = item % ACROSS * VECTOR;
    Vector<float, VECTOR> vector{};
    if (j < regions) vector = load_vector<VECTOR>(rows + j * padded + first_c + c);
    store_vector<VECTOR>(tile + j * CHUNK_PITCH + c, vector);
  }
}

// A block's shared memory.
struct Shared {
  static constexpr int MAP_BYTES = TILE * CHUNK_PITCH * sizeof(float);
  static constexpr int AFFINITY_BYTES = TILE * TILE_PITCH * sizeof(float), MAPS = 3;
  static constexpr int OFFSET_BYTES = MAPS * TILE * sizeof(int64_t), WORK_BYTES = 32;
  static constexpr int BYTES = 2 * MAP_BYTES + AFFINITY_BYTES + OFFSET_BYTES + WORK_BYTES;
  static_assert(sizeof(Work) <= WORK_BYTES);
  static_assert(2 * MAP_BYTES >= TILE * TILE_PITCH * int(sizeof(float)));

  unsigned char* buffer;
  float* map = reinterpret_cast<float*>(buffer);                                           // [TILE][CHUNK]
  float* small = reinterpret_cast<float*>(buffer + MAP_BYTES);                             // [MAX_REGIONS][CHUNK]
  float* affinities = reinterpret_cast<float*>(buffer + 2 * MAP_BYTES);                    // [TILE][MAX_REGIONS]
  int64_t* offsets = reinterpret_cast<int64_t*>(buffer + 2 * MAP_BYTES + AFFINITY_BYTES);  // [MAPS][TILE]
  Work* work = reinterpret_cast<Work*>(buffer + 2 * MAP_BYTES + AFFINITY_BYTES + OFFSET_BYTES);
  // [TILE][MAX_REGIONS] in the place of map and small, when they are no longer needed.
  float* scratch = reinterpret_cast<float*>(buffer);
  float* matrix = map;

  explicit __device__ __forceinline__ Shared(unsigned char* buffer) : buffer(buffer) {}
};

// function(work, tile) for the tiles of a block's chunk. Between tiles the work lies in shared memory, and what follows
// from it with it: else the compiler would compute dozens of addresses once and run out of registers.
template <typename Function>
static __device__ __forceinline__ void for_each_tile(const AffinitiesCuda& p, const Shared& shared, Function function) {
  if (threadIdx.x == 0) *shared.work = locate_work(p);
  __syncthreads();
  const int chunk = static_cast<int>(blockIdx.x) % p.chunks, first = chunk * p.chunk_tiles;
  for (int index = first; index < min(first + p.chunk_tiles, p.tiles); ++index) {
    const Work work = *shared.work;
    function(work, Tile{index * TILE, min(TILE, p.positions - index * TILE), index == first});
  }
}

// sums (64 x N) += a (64 x depth) · b (depth x N), a block together. Both lie in shared memory, a by rows or by
// columns, b likewise; rows and columns from `rows` and `columns` on may be left out. depth is a multiple of DEPTH.
constexpr int DEPTH = 4;

template <int N, bool b_by_row>
struct Product {
  // Threads stand 16 x 16; each has 4 rows side by side, and columns side by side or, where b lies by columns, 16
  // apart.
  static constexpr int ACROSS = N / 16, COUNT = 4 * ACROSS, RUN = b_by_row ? ACROSS : 1;
  float sums[COUNT] = {};

  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / 16 * 4 + i / ACROSS; }
  static __device__ __forceinline__ int column(int i) {
    const int across = static_cast<int>(threadIdx.x) % 16, j = i % ACROSS;
    return b_by_row ? across * ACROSS + j : across + 16 * j;
  }

  template <bool a_by_row>
  __device__ __forceinline__ void add(const float* a, int a_pitch, const float* b, int b_pitch, int rows, int columns,
                                      int depth) {
    if (row(0) >= rows) return;
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      Vector<float, 4> left[4];  // by rows: [row][k], by columns: [k][row]
#pragma unroll
      for (int i = 0; i < 4; ++i)
        left[i] = load_vector<4>(a_by_row ? a + (row(0) + i) * a_pitch + k : a + (k + i) * a_pitch + row(0));
      if constexpr (b_by_row) {
        if (column(0) < columns) {
#pragma unroll
          for (int kk = 0; kk < 4; ++kk) {
            const Vector<float, ACROSS> right = load_vector<ACROSS>(b + (k + kk) * b_pitch + column(0));
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
              sums[i] += (a_by_row ? left[i / ACROSS].at[kk] : left[kk].at[i / ACROSS]) * right.at[i % ACROSS];
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
          if (16 * j < columns) {
            const Vector<float, 4> right = load_vector<4>(b + column(j) * b_pitch + k);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int kk = 0; kk < 4; ++kk)
                sums[i * ACROSS + j] += (a_by_row ? left[i].at[kk] : left[kk].at[i]) * right.at[kk];
          }
        }
      }
    }
  }
};

// function(row, column, sum) for each sum of a thread.
template <typename Sums, typename Function>
static __device__ __forceinline__ void for_each(Sums& product, Function function) {
#pragma unroll
  for (int i = 0; i < Sums::COUNT; ++i) function(Sums::row(i), Sums::column(i), product.sums[i]);
}

// A thread's sums, to and from rows in global memory: in vectors as far as sums lie side by side.
template <typename Sums>
static __device__ __forceinline__ void load_sums(Sums& product, const float* from, int pitch, int rows, int columns) {
#pragma unroll
  for (int i = 0; i < Sums::COUNT; i += Sums::RUN)
    if (Sums::row(i) < rows && Sums::column(i) < columns) {
      const auto run = load_vector<Sums::RUN>(from + Sums::row(i) * pitch + Sums::column(i));
#pragma unroll
      for (int v = 0; v < Sums::RUN; ++v) product.sums[i + v] = run.at[v];
    }
}

template <typename Sums>
static __device__ __forceinline__ void store_sums(const Sums& product, float* to, int pitch, int rows, int columns) {
#pragma unroll
  for (int i = 0; i < Sums::COUNT; i += Sums::RUN)
    if (Sums::row(i) < rows && Sums::column(i) < columns) {
      Vector<float, Sums::RUN> run;
#pragma unroll
      for (int v = 0; v < Sums::RUN; ++v) run.at[v] = product.sums[i + v];
      store_vector<Sums::RUN>(to + Sums::row(i) * pitch + Sums::column(i), run);
    }
}

// 0 and 1 at the infinities, NaN at NaN; down to the smallest numbers, where exp(-logit) has no place in a float.
static __device__ __forceinline__ float sigmoid(float logit) {
  const float e = expf(-fabsf(logit)), upper = 1.0f / (1.0f + e);
  return logit < 0.0f ? e * upper : upper;
}

// Adds to sums over channels of positions and regions those of the chunk at hand.
static __device__ __forceinline__ void add_map_by_small(Product<MAX_REGIONS, false>& product, const Shared& shared,
                                                        const Work& work) {
  product.add<true>(shared.map, CHUNK_PITCH, shared.small, CHUNK_PITCH, TILE, work.regions, CHUNK);
}

// The affinities of a tile to a scale's regions, and those past the end, which mean nothing. Ends with a barrier.
template <typename Access>
static __device__ __forceinline__ Product<MAX_REGIONS, false> affinities_of(const AffinitiesCuda& p,
                                                                            const Shared& shared, const Work& work,
                                                                            const Window& x) {
  const float* weight = static_cast<const float*>(p.packed_weight) + work.first_row * int64_t(p.padded);
  const float* bias = p.bias + int64_t(work.b) * p.rows + work.first_row;
  Product<MAX_REGIONS, false> product;
  for_each(product, [&](int, int j, float& sum) { sum = j < work.regions ? bias[j] : 0.0f; });
  Access map;
  map.fetch(x, 0);
  for (int c = 0; c < p.channels; c += CHUNK) {
    map.put(x, shared.map);
    put_small(weight, work.regions, p.padded, c, shared.small);
    __syncthreads();
    if (c + CHUNK < p.channels) map.fetch(x, c + CHUNK);
    add_map_by_small(product, shared, work);
    __syncthreads();
  }
  for_each(product, [](int, int, float& sum) { sum = sigmoid(sum); });
  return product;
}

// Small matrices as the products take them: rounded to the map's type, rows padded with zeros.
struct PackCuda {
  const float* from[2];  // (rows, channels)
  void* to[2];           // (rows, padded), zero beyond the channels
  int rows[2];
  int channels, padded;
};

// grid (rows of both): a block copies a row
static __global__ void pack_rows(const PackCuda p) {
  const int block = static_cast<int>(blockIdx.x), which = block < p.rows[0] ? 0 : 1;
  const int64_t row = which == 0 ? block : block - p.rows[0];
  const float* from = (which == 0 ? p.from[0] : p.from[1]) + row * p.channels;
  float* to = static_cast<float*>(which == 0 ? p.to[0] : p.to[1]) + row * p.padded;
  for (int c = static_cast<int>(threadIdx.x); c < p.padded; c += static_cast<int>(blockDim.x))
    to[c] = c < p.channels ? from[c] : 0.0f;
}
