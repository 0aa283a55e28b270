// What the CUDA kernels on affinities share: tiles in shared memory, the products between them, the affinities.
//
// A block works on one scale of one image, on tiles of TILE positions. In shared memory lie a chunk of the map's
// channels at these positions, the same chunk of a small matrix with a row for each region (weight, regions), and a
// tile of positions x regions (affinities, their gradients). Whatever the operation, there are three products:
//
//   map · smallᵀ     sums over channels     logits, gradients of affinities
//   tile · small     sums over regions      what every position is given
//   tileᵀ · map      sums over positions    gradients of the small matrices
//
// Before them pack_rows rounds the small matrices to the map's type; its least, everything moved once:
//
//   pack_rows  moves weight, regions, workspace
//
// bfloat16 and float16 go to the tensor cores, float32 is multiplied as float32. Both leave a thread the same number
// of sums. Whatever lies past the end (positions, channels, regions) is zero in shared memory.
#pragma once

#include <cmath>

#include "../common/mma.cuh"

constexpr int MAX_SCALES = 16, MAX_REGIONS = 64;  // as apc_kernels/ops/affinities knows
constexpr int THREADS = 256, TILE = 64;
constexpr int PADDED = 64;  // rows of small matrices lie at multiples of so many numbers in global memory

template <typename T>
constexpr int CHUNK = 128 / sizeof(T);  // channels in shared memory at a time
template <typename T>
constexpr int VECTOR = 16 / sizeof(T);
// Rows in shared memory lie 16 bytes further apart than they are long: eight of them start in different banks.
template <typename T>
constexpr int CHUNK_PITCH = CHUNK<T> + VECTOR<T>;
template <typename T>
constexpr int TILE_PITCH = TILE + VECTOR<T>;
constexpr int SCRATCH_PITCH = TILE_PITCH<float>;
static_assert(TILE == MAX_REGIONS);  // a tile's rows are as long, whether they run over positions or regions

// A map (batch, scales * channels, positions) in global memory; strides in elements.
struct MapCuda {
  void* data;  // null where it is not given
  int64_t stride_b, stride_c, stride_y, stride_x;
  int width;  // position n lies at n / width, n % width
  bool by_channel;
};

// The part of a kernel's parameters that all operations on affinities have. Chunks and sums depend on the shape alone.
struct AffinitiesCuda {
  int batch, channels, positions;  // channels: of one scale
  int num_scales, rows, pairs;     // Σs² and Σs⁴
  int padded;                      // channels of a row in packed small matrices
  int tiles, chunk_tiles, chunks;  // of an image; of a chunk; of an image
  int sizes[MAX_SCALES];           // s², the regions of a scale
  MapCuda x;
  const float* weight;  // (rows, channels)
  const float* bias;    // (batch, rows)
  void* packed_weight;  // (rows, padded) in the map's type; beside low-precision maps in fragments.cuh's order
  int fragment_rows;    // of an image there
  bool wide;
  void* weight_pairs;
};

// Rows of a scale's packed matrices beside low-precision maps. One at least is beyond the regions: sums over positions
// count there. `wide` calls have a scale of 7 or 8, and as many rows for each.
constexpr int WIDE = 48;
static inline __device__ constexpr int fragment_rows(int regions, bool wide) {
  return wide ? 80 : regions < 16 ? 16 : WIDE;
}
static_assert(fragment_rows(MAX_REGIONS, true) > MAX_REGIONS);

// What blockIdx.x counts: images, scales, chunks of positions.
struct Work {
  int b, scale, chunk, regions, first_row, first_pair, first_fragment_row;
};

static __device__ __forceinline__ Work locate_work(const AffinitiesCuda& p) {
  const int block = static_cast<int>(blockIdx.x);
  Work work{block / (p.chunks * p.num_scales), block / p.chunks % p.num_scales, block % p.chunks, 0, 0, 0, 0};
  for (int k = 0; k < work.scale; ++k) {
    work.first_row += p.sizes[k], work.first_pair += p.sizes[k] * p.sizes[k];
    work.first_fragment_row += fragment_rows(p.sizes[k], p.wide);
  }
  work.regions = p.sizes[work.scale];
  return work;
}

// The positions of a tile.
struct Tile {
  int first, count;
  bool first_of_chunk;
};

// Where the tile of a map lies in global memory.
template <typename T>
struct Window {
  const MapCuda& map;
  T* data;                 // of the image, first channel of the scale
  const int64_t* offsets;  // of the tile's positions, in shared memory; -1 past the end
  int channels;
};

// Writes the offsets: they are there after the next barrier, which also ends whatever the tile before was read for.
template <typename T>
static __device__ __forceinline__ Window<T> open_window(const AffinitiesCuda& p, const MapCuda& map, const Work& work,
                                                        int first, int64_t* offsets) {
  if (threadIdx.x < TILE && map.data != nullptr) {
    const int n = first + static_cast<int>(threadIdx.x);
    offsets[threadIdx.x] = n < p.positions ? n / map.width * map.stride_y + n % map.width * map.stride_x : -1;
  }
  T* data = static_cast<T*>(map.data) + work.b * map.stride_b + int64_t(work.scale) * p.channels * map.stride_c;
  return {map, data, offsets, p.channels};
}

// How a chunk of a map is read and written: in vectors of V that run along channels or along positions. Where not every
// map of a call has such vectors, V is 1, and each map has its own direction.
template <typename T, int V, bool along_channels>
struct MapAccess {
  static constexpr bool TILE_BY_CHANNEL = V == 1 || along_channels;  // channels lie side by side in shared memory
  static constexpr int ITEMS = TILE * CHUNK<T> / V / THREADS;
  static constexpr int PITCH = TILE_BY_CHANNEL ? CHUNK_PITCH<T> : TILE_PITCH<T>;

  static __device__ __forceinline__ int place(int n, int c) { return TILE_BY_CHANNEL ? n * PITCH + c : c * PITCH + n; }

  // function(i, where in shared memory, where in global memory or null past the end) for each of a thread's vectors.
  template <typename Function>
  static __device__ __forceinline__ void for_each_vector(const Window<T>& window, int first_c, Function function) {
    const bool by_channel = V == 1 ? window.map.by_channel : along_channels;
    const int64_t stride_c = V > 1 && along_channels ? 1 : window.map.stride_c;
#pragma unroll(V == 1 ? 4 : ITEMS)
    for (int i = 0; i < ITEMS; ++i) {
      const int item = static_cast<int>(threadIdx.x) + i * THREADS;
      const int n = by_channel ? item / (CHUNK<T> / V) : item % (TILE / V) * V;
      const int c = by_channel ? item % (CHUNK<T> / V) * V : item / (TILE / V);
      const bool inside = window.offsets[n] >= 0 && first_c + c < window.channels;
      function(i, place(n, c), inside ? window.data + window.offsets[n] + (first_c + c) * stride_c : nullptr);
    }
  }

  // A chunk on its way from global to shared memory. Vectors are fetched before the products of the chunk before;
  // single numbers, of which there are too many for a thread's registers, when they are put.
  static constexpr bool AHEAD = V > 1;
  Vector<T, V> items[AHEAD ? ITEMS : 1];
  int first_c;

  __device__ __forceinline__ void fetch(const Window<T>& window, int first_channel) {
    first_c = first_channel;
    if constexpr (AHEAD) for_each_vector(window, first_c, [&](int i, int, const T* from) { items[i] = read(from); });
  }

  __device__ __forceinline__ void put(const Window<T>& window, T* tile) const {
    for_each_vector(window, first_c, [&](int i, int place, const T* from) {
      if constexpr (AHEAD)
        store_vector<V>(tile + place, items[i]);
      else
        store_vector<V>(tile + place, read(from));
    });
  }

  static __device__ __forceinline__ void write(const Window<T>& window, int first_c, const T* tile) {
    for_each_vector(window, first_c, [&](int, int place, T* to) {
      if (to != nullptr) store_vector<V>(to, load_vector<V>(tile + place));
    });
  }

 private:
  static __device__ __forceinline__ Vector<T, V> read(const T* from) {
    return from == nullptr ? Vector<T, V>{} : load_vector<V>(from);
  }
};

// A chunk of a small matrix from its packed copy: whole vectors wherever it ends, zeros for rows past the end. It comes
// out of the cache; fetching it ahead as well would cost more registers than there are.
template <typename T>
static __device__ __forceinline__ void put_small(const T* rows, int regions, int padded, int first_c, T* tile) {
  constexpr int ACROSS = CHUNK<T> / VECTOR<T>;
#pragma unroll
  for (int i = 0; i < MAX_REGIONS * ACROSS / THREADS; ++i) {
    const int item = static_cast<int>(threadIdx.x) + i * THREADS, j = item / ACROSS, c = item % ACROSS * VECTOR<T>;
    Vector<T, VECTOR<T>> vector{};
    if (j < regions) vector = load_vector<VECTOR<T>>(rows + j * padded + first_c + c);
    store_vector<VECTOR<T>>(tile + j * CHUNK_PITCH<T> + c, vector);
  }
}

// A block's shared memory.
template <typename T>
struct Shared {
  static constexpr int MAP_BYTES = TILE * CHUNK_PITCH<T> * sizeof(T);
  static_assert(MAP_BYTES >= CHUNK<T> * TILE_PITCH<T> * int(sizeof(T)));
  static constexpr int AFFINITY_BYTES = TILE * TILE_PITCH<T> * sizeof(T), MAPS = 3;
  static constexpr int OFFSET_BYTES = MAPS * TILE * sizeof(int64_t), WORK_BYTES = 32;
  static constexpr int BYTES = 2 * MAP_BYTES + AFFINITY_BYTES + OFFSET_BYTES + WORK_BYTES;
  static_assert(sizeof(Work) <= WORK_BYTES);
  static_assert(2 * MAP_BYTES >= TILE * SCRATCH_PITCH * int(sizeof(float)));

  unsigned char* buffer;
  T* map = reinterpret_cast<T*>(buffer);                // [TILE][CHUNK], or [CHUNK][TILE] for vectors along positions
  T* small = reinterpret_cast<T*>(buffer + MAP_BYTES);  // [MAX_REGIONS][CHUNK]
  T* affinities = reinterpret_cast<T*>(buffer + 2 * MAP_BYTES);                            // [TILE][MAX_REGIONS]
  int64_t* offsets = reinterpret_cast<int64_t*>(buffer + 2 * MAP_BYTES + AFFINITY_BYTES);  // [MAPS][TILE]
  Work* work = reinterpret_cast<Work*>(buffer + 2 * MAP_BYTES + AFFINITY_BYTES + OFFSET_BYTES);
  // [TILE][MAX_REGIONS] in the place of map and small, when they are no longer needed.
  float* scratch = reinterpret_cast<float*>(buffer);
  T* matrix = map;

  explicit __device__ __forceinline__ Shared(unsigned char* buffer) : buffer(buffer) {}
};

// function(work, tile) for the tiles of a block's chunk. Between tiles the work lies in shared memory, and what follows
// from it with it: else the compiler would compute dozens of addresses once and run out of registers.
template <typename T, typename Function>
static __device__ __forceinline__ void for_each_tile(const AffinitiesCuda& p, const Shared<T>& shared,
                                                     Function function) {
  if (threadIdx.x == 0) *shared.work = locate_work(p);
  __syncthreads();
  const int chunk = static_cast<int>(blockIdx.x) % p.chunks, first = chunk * p.chunk_tiles;
  for (int index = first; index < min(first + p.chunk_tiles, p.tiles); ++index) {
    const Work work = *shared.work;
    function(work, Tile{index * TILE, min(TILE, p.positions - index * TILE), index == first});
  }
}

// sums (64 x N) += a (64 x depth) · b (depth x N), a block together. Both lie in shared memory, a by rows or by
// columns, b likewise; rows and columns from `rows` and `columns` on may be left out. depth is a multiple of DEPTH<T>.
template <typename T>
constexpr int DEPTH = std::is_same_v<T, float> ? 4 : 16;

template <typename T, int N, bool b_by_row>
struct Product {
  static constexpr int COUNT = TILE * N / THREADS, RUN = 2;  // a thread's sums; RUN of them lie side by side
  float sums[COUNT] = {};

  // Warps stand 4 x 2; each has 16 rows, and every other 16 columns.
  static __device__ __forceinline__ int row(int i) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    return warp % 4 * 16 + i % 4 / 2 * 8 + lane / 4;
  }
  static __device__ __forceinline__ int column(int i) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    return (i / 8 * 2 + warp / 4) * 16 + i % 8 / 4 * 8 + lane % 4 * 2 + i % 2;
  }

  template <bool a_by_row>
  __device__ __forceinline__ void add(const T* a, int a_pitch, const T* b, int b_pitch, int rows, int columns,
                                      int depth) {
    const int warp = static_cast<int>(threadIdx.x) / 32, first_row = warp % 4 * 16;
    if (first_row >= rows) return;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[4];
      load_a<a_by_row>(left, a_by_row ? a + first_row * a_pitch + k : a + k * a_pitch + first_row, a_pitch);
#pragma unroll
      for (int q = 0; q < N / 32; ++q) {
        const int first_column = (q * 2 + warp / 4) * 16;
        if (first_column < columns) {
          uint32_t right[4];
          load_two_b<b_by_row>(right, b_by_row ? b + k * b_pitch + first_column : b + first_column * b_pitch + k,
                               b_pitch);
          multiply_add<T>(sums + 8 * q, left, right);
          multiply_add<T>(sums + 8 * q + 4, left, right + 2);
        }
      }
    }
  }
};

template <int N, bool b_by_row>
struct Product<float, N, b_by_row> {
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

// Adds to sums over channels of positions and regions those of the chunk at hand.
template <typename T, typename Access>
static __device__ __forceinline__ void add_map_by_small(Product<T, MAX_REGIONS, false>& product,
                                                        const Shared<T>& shared, const Work& work) {
  product.template add<Access::TILE_BY_CHANNEL>(shared.map, Access::PITCH, shared.small, CHUNK_PITCH<T>, TILE,
                                                work.regions, CHUNK<T>);
}

// The affinities of a tile to a scale's regions, and those past the end, which mean nothing. Ends with a barrier.
template <typename T, typename Access>
static __device__ __forceinline__ Product<T, MAX_REGIONS, false> affinities_of(const AffinitiesCuda& p,
                                                                               const Shared<T>& shared,
                                                                               const Work& work, const Window<T>& x) {
  const T* weight = static_cast<const T*>(p.packed_weight) + work.first_row * int64_t(p.padded);
  const float* bias = p.bias + int64_t(work.b) * p.rows + work.first_row;
  Product<T, MAX_REGIONS, false> product;
  for_each(product, [&](int, int j, float& sum) { sum = j < work.regions ? bias[j] : 0.0f; });
  Access map;
  map.fetch(x, 0);
  for (int c = 0; c < p.channels; c += CHUNK<T>) {
    map.put(x, shared.map);
    put_small(weight, work.regions, p.padded, c, shared.small);
    __syncthreads();
    if (c + CHUNK<T> < p.channels) map.fetch(x, c + CHUNK<T>);
    add_map_by_small<T, Access>(product, shared, work);
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
template <typename T>
__global__ void pack_rows(const PackCuda p) {
  const int block = static_cast<int>(blockIdx.x), which = block < p.rows[0] ? 0 : 1;
  const int64_t row = which == 0 ? block : block - p.rows[0];
  const float* from = (which == 0 ? p.from[0] : p.from[1]) + row * p.channels;
  T* to = static_cast<T*>(which == 0 ? p.to[0] : p.to[1]) + row * p.padded;
  for (int c = static_cast<int>(threadIdx.x); c < p.padded; c += static_cast<int>(blockDim.x))
    to[c] = round_to<T>(c < p.channels ? from[c] : 0.0f);
}
