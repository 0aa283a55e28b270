// What the kernels on affinities of bfloat16 and float16 maps share: rows of maps as tensor cores take them.
//
// A warp works on ROWS positions of one scale of one image. Lane 4g + t of it has the positions g and g + 8, and of
// every STRETCH channels the eight from 8t on: vectors of 16 bytes, which it moves whole. Which column of a product is
// which channel is free, so long as all operands agree. Therefore a vector, as it lies in memory, is
//
//   in sums over channels     pieces of a in two products, whose b are the same vector of row g of a small matrix
//   in results over channels  c of four products, whose b hold the channels in the order of `pair_place`
//
// and logits, once turned into affinities, are pieces of a in sums over regions. No lane needs what another one has
// read, and there is no barrier. Only sums over positions go through a tile in shared memory, and ldmatrix transposes
// it.
//
// Small matrices (weight, regions) are packed beforehand in both orders, stretch by stretch, so that the lanes of a
// warp read 512 bytes that lie side by side. The least of this kernel, everything moved once:
//
//   pack_fragments  moves weight, regions, shift, constant, workspace
#pragma once

#include <cmath>

#include "../common/mma.cuh"
#include "affinities.cuh"

constexpr int WARPS = 4, ROWS = 16, BLOCK_ROWS = WARPS * ROWS, WARP_THREADS = 32 * WARPS;
constexpr int STRETCH = 32;
constexpr int RESIDENT = 512;  // channels of a map that a block keeps in shared memory
static_assert(BLOCK_ROWS == TILE && PADDED % (2 * STRETCH) == 0 && RESIDENT % PADDED == 0);

// Blocks that share a multiprocessor, and so the registers of each: with a tile of a map as many as shared memory
// holds.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int BLOCKS = 2;
#else
constexpr int BLOCKS = 3;
#endif

using Raw = Vector<uint32_t, 4>;  // eight 16-bit numbers

template <int value>
using Constant = std::integral_constant<int, value>;

// function(fragment_rows / 8) for a block's scale: products have as many tiles of 8 columns.
template <typename Function>
static __device__ __forceinline__ void with_region_tiles(int regions, Function function) {
  if (fragment_rows(regions) == 16)
    function(Constant<2>{});
  else
    function(Constant<6>{});
}

// What lies before the tiles in shared memory.
struct Header {
  Work work;
  float of_warps[WARPS];  // for largest_of
};
constexpr int HEADER_BYTES = 128;
static_assert(sizeof(Header) <= HEADER_BYTES);

// function(work, tile) for the tiles of a block's chunk, shared memory behind the header being free. Between tiles the
// work lies there: else the compiler would compute dozens of addresses once and run out of registers.
template <typename Function>
static __device__ __forceinline__ void for_each_tile_of(const AffinitiesCuda& p, Header& header, Function function) {
  if (threadIdx.x == 0) header.work = locate_work(p);
#pragma unroll 1
  for (int i = 0; i < p.chunk_tiles; ++i) {
    __syncthreads();
    const Work work = header.work;
    const int index = work.chunk * p.chunk_tiles + i;
    if (index >= p.tiles) return;
    function(work, Tile{index * TILE, min(TILE, p.positions - index * TILE), i == 0});
  }
}

struct Lane {
  int warp, g, t;
};
static __device__ __forceinline__ Lane this_lane() {
  const int thread = static_cast<int>(threadIdx.x);
  return {thread / 32, thread % 32 / 4, thread % 4};
}
// The same, computed anew: what follows from it would take registers from here to where it is next needed.
static __device__ __forceinline__ Lane this_lane_anew() {
  int thread = static_cast<int>(threadIdx.x);
  forget(thread);
  return {thread / 32, thread % 32 / 4, thread % 4};
}

// Which of a lane's two positions lie before the count-th of the block.
struct Halves {
  bool at[2];
};
static __device__ __forceinline__ Halves halves_before(int count) {
  const Lane lane = this_lane_anew();
  const int row = lane.warp * ROWS + lane.g;
  return {{row < count, row + 8 < count}};
}

// A lane's vectors of a stretch of channels, at both of its positions.
struct RawRows {
  Raw at[2];
};

// A lane's two positions of a map: channels that lie side by side where a call has p.vectors, else single numbers that
// lie anywhere.
struct MapRows {
  const AffinitiesCuda& p;
  const MapCuda& map;
  uint16_t* at[2];  // at the lane's first channel
  int channels[2];  // from there on; none past the last position

  __device__ __forceinline__ MapRows(const AffinitiesCuda& p, const MapCuda& map, const Work& work, int first)
      : p(p), map(map) {
    const Lane lane = this_lane();
    const int width = max(map.width, 1);  // 0 where the map is not given
    auto* data = static_cast<uint16_t*>(map.data) + work.b * map.stride_b +
                 (int64_t(work.scale) * p.channels + 8 * lane.t) * map.stride_c;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = first + lane.warp * ROWS + lane.g + 8 * half;
      at[half] = data + (n / width * map.stride_y + n % width * map.stride_x);
      channels[half] = n < p.positions ? p.channels - 8 * lane.t : 0;
    }
  }

  __device__ __forceinline__ bool inside(int half, int c) const { return c < channels[half]; }

  // The lane's vectors of the stretch from channel c on.
  __device__ __forceinline__ RawRows read(int c) const {
    if (!p.vectors) return gather(c);
    RawRows rows{};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (inside(half, c)) rows.at[half] = load_vector<4>(reinterpret_cast<const uint32_t*>(at[half] + c));
    return rows;
  }

  // The same, number by number.
  __device__ __forceinline__ RawRows gather(int c) const {
    RawRows rows{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Raw& raw = rows.at[half];
      const uint16_t* from = at[half] + c * map.stride_c;
      if (inside(half, c + 7)) {
#pragma unroll
        for (int i = 0; i < 8; ++i, from += map.stride_c) raw.at[i / 2] |= static_cast<uint32_t>(*from) << (i % 2 * 16);
      } else {
#pragma unroll 1
        for (int i = 0; i < 8; ++i, from += map.stride_c) push(raw, inside(half, c + i) ? *from : uint16_t(0));
      }
    }
    return rows;
  }

  __device__ __forceinline__ void write(int c, const RawRows& rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Raw& raw = rows.at[half];
      if (p.vectors) {
        if (inside(half, c)) store_vector<4>(reinterpret_cast<uint32_t*>(at[half] + c), raw);
        continue;
      }
      uint16_t* to = at[half] + c * map.stride_c;
      if (inside(half, c + 7)) {
#pragma unroll
        for (int i = 0; i < 8; ++i, to += map.stride_c) *to = static_cast<uint16_t>(raw.at[i / 2] >> (i % 2 * 16));
      } else {
        Raw left = raw;
#pragma unroll 1
        for (int i = 0; inside(half, c + i); ++i, to += map.stride_c) *to = push(left, 0);
      }
    }
  }

 private:
  // Moves all numbers to the place before, puts one last, and returns the one that was first.
  static __device__ __forceinline__ uint16_t push(Raw& raw, uint16_t last) {
    const auto first = static_cast<uint16_t>(raw.at[0]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      raw.at[i] = raw.at[i] >> 16 | (i < 3 ? raw.at[i + 1] : static_cast<uint32_t>(last)) << 16;
    return first;
  }
};

// A part of a map in shared memory, [BLOCK_ROWS][RESIDENT channels at most]. The vectors of a row are shuffled such
// that neither the lanes of a warp, each with its own vectors, nor ldmatrix meets a bank twice.
struct MapTile {
  unsigned char* begin;
  int row_bytes;  // a multiple of 128

  __device__ __forceinline__ MapTile(unsigned char* begin, int padded)
      : begin(begin), row_bytes(2 * min(padded, RESIDENT)) {}

  __device__ __forceinline__ uint32_t* place(int n, int vector) const {
    const int shuffled = vector ^ (n % 2 * 4 + n / 2 % 4);
    return reinterpret_cast<uint32_t*>(begin + n * row_bytes + shuffled * 16);
  }
  // The lane's own vector of the stretch from channel c on.
  __device__ __forceinline__ uint32_t* own(int half, int c) const {
    const Lane lane = this_lane();
    return place(lane.warp * ROWS + lane.g + 8 * half, c / 8 + lane.t);
  }

  __device__ __forceinline__ RawRows read(int c) const {
    return {{load_vector<4>(own(0, c)), load_vector<4>(own(1, c))}};
  }
  __device__ __forceinline__ void write(int c, const RawRows& rows) const {
    store_vector<4>(own(0, c), rows.at[0]), store_vector<4>(own(1, c), rows.at[1]);
  }

  // Begins to bring the lane's vectors of the map's stretch from channel `first + c` on.
  __device__ __forceinline__ void begin_fetch(const MapRows& map, int first, int c) const {
    if (map.p.vectors)
      begin_copies(map, first, c);
    else
      write(c, map.gather(first + c));
  }
  // Brings a part of the map: its channels from `first` on.
  __device__ __forceinline__ void fetch(const MapRows& map, int first, int channels) const {
    if (map.p.vectors) {
#pragma unroll 2
      for (int c = 0; c < channels; c += STRETCH) begin_copies(map, first, c);
      wait_for_copies();
    } else {
#pragma unroll 1
      for (int c = 0; c < channels; c += STRETCH) write(c, map.gather(first + c));
    }
  }

  __device__ __forceinline__ int bytes() const { return BLOCK_ROWS * row_bytes; }

 private:
  __device__ __forceinline__ void begin_copies(const MapRows& map, int first, int c) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = map.inside(half, first + c);
      begin_copy(own(half, c), map.at[half] + (inside ? first + c : 0), inside);
    }
  }
};
constexpr int map_tile_bytes(int padded) { return BLOCK_ROWS * 2 * (padded < RESIDENT ? padded : RESIDENT); }

// Numbers of positions and regions, or of regions and regions, in shared memory: rows of 8 * TILES. They lie 16 bytes
// further apart than they are long: eight of them start in different banks.
template <int TILES>
struct RegionTile {
  static constexpr int PITCH = 8 * TILES + 8;
  uint16_t* begin;

  // Puts the lane's two numbers of a tile of 8 regions.
  __device__ __forceinline__ void put(int half, int tile, uint32_t pair) const {
    const Lane lane = this_lane();
    uint16_t* row = begin + (lane.warp * ROWS + lane.g + 8 * half) * PITCH;
    *reinterpret_cast<uint32_t*>(row + 8 * tile + 2 * lane.t) = pair;
  }
};
constexpr int region_tile_bytes(int rows) { return (rows < BLOCK_ROWS ? BLOCK_ROWS : rows) * (rows + 8) * 2; }

// A scale's packed matrix of one image as a lane reads it.
struct PackedRows {  // row g of each 8, a vector of its channels
  const uint32_t* at;
  int step;  // to the next stretch
  __device__ __forceinline__ PackedRows(const void* plain, int64_t first_row, int rows, int padded) {
    const Lane lane = this_lane();
    at = static_cast<const uint32_t*>(plain) + first_row * (padded / 2) + lane.g * (STRETCH / 2) + lane.t * 4;
    step = rows * (STRETCH / 2);
  }
  __device__ __forceinline__ Raw read(int c, int tile) const {
    return load_vector<4>(at + c / STRETCH * step + tile * 8 * (STRETCH / 2));
  }
};
struct PackedPairs {  // rows 2t and 2t + 1 of each 8, four channels
  const uint32_t* at;
  int step;
  __device__ __forceinline__ PackedPairs(const void* pairs, int64_t first_row, int rows, int padded) {
    const Lane lane = this_lane();
    at = static_cast<const uint32_t*>(pairs) + first_row * (padded / 2) + lane.t * STRETCH + lane.g * 4;
    step = rows * (STRETCH / 2);
  }
  __device__ __forceinline__ Raw read(int c, int eighth) const {
    return load_vector<4>(at + c / STRETCH * step + eighth * 4 * STRETCH);
  }
};
// Where channel c of a stretch lies among pairs: column g of product q holds channel g / 2 * 8 + 2q + g % 2.
static __device__ __forceinline__ int pair_place(int c) { return c / 8 * 8 + c % 2 * 4 + c % 8 / 2; }

// Eight numbers of a vector of float32, as four products take them to add to.
struct Eight {
  float at[4][4];
  __device__ __forceinline__ Eight(const float* from) {
    Vector<float, 4> first{}, second{};
    if (from != nullptr) first = load_vector<4>(from), second = load_vector<4>(from + 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i / 2][i % 2] = at[i / 2][2 + i % 2] = i < 4 ? first.at[i % 4] : second.at[i % 4];
  }
};

template <int TILES>
using RegionSums = float[TILES][4];  // a lane's sums of its two positions and of columns 2t and 2t + 1 of every 8

// function(half, region, sum) for each sum of a lane.
template <int TILES, typename Function>
static __device__ __forceinline__ void for_each_sum(RegionSums<TILES>& sums, Function function) {
  const Lane lane = this_lane_anew();
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) function(i / 2, 8 * tile + 2 * lane.t + i % 2, sums[tile][i]);
}

// sums += rows · smallᵀ over a stretch of channels
template <typename T, int TILES>
static __device__ __forceinline__ void add_over_channels(RegionSums<TILES>& sums, const RawRows& rows,
                                                         const PackedRows& small, int c) {
  const Raw &upper = rows.at[0], &lower = rows.at[1];
  const uint32_t first[4] = {upper.at[0], lower.at[0], upper.at[1], lower.at[1]};
  const uint32_t second[4] = {upper.at[2], lower.at[2], upper.at[3], lower.at[3]};
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const Raw b = small.read(c, tile);
    multiply_add<T>(sums[tile], first, b.at);
    multiply_add<T>(sums[tile], second, b.at + 2);
  }
}

// Numbers of positions and regions, rounded, as products take them.
template <int TILES>
struct RegionFragments {
  uint32_t a[TILES / 2][4];

  // number(half, region, sum)
  template <typename T, typename Function>
  __device__ __forceinline__ void round(const RegionSums<TILES>& sums, Function number) {
    const Lane lane = this_lane_anew();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 8 * tile + 2 * lane.t;
        a[tile / 2][tile % 2 * 2 + half] =
            round_pair<T>(number(half, j, sums[tile][2 * half]), number(half, j + 1, sums[tile][2 * half + 1]));
      }
  }

  __device__ __forceinline__ void put(const RegionTile<TILES>& to) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) to.put(half, tile, a[tile / 2][tile % 2 * 2 + half]);
  }
};

// sums (of a stretch of channels) = numbers · small + added
template <typename T, int TILES>
static __device__ __forceinline__ void add_over_regions(float (&sums)[4][4], const RegionFragments<TILES>& numbers,
                                                        const PackedPairs& small, int c, const Eight& added) {
#pragma unroll
  for (int k = 0; k < TILES / 2; ++k) {
    const Raw first = small.read(c, 2 * k), second = small.read(c, 2 * k + 1);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t b[2] = {first.at[q], second.at[q]};
      multiply_add<T>(sums[q], numbers.a[k], b, k == 0 ? added.at[q] : sums[q]);
    }
  }
}

// As `sigmoid`, for logits that are sums of rounded products.
static __device__ __forceinline__ float sigmoid_of_products(float logit) {
  const float e = exponential(-fabsf(logit)), upper = reciprocal(1.0f + e);
  return logit < 0.0f ? e * upper : upper;
}

// function(first channel, channels) for each part of a map that lies in shared memory as a whole.
template <typename Function>
static __device__ __forceinline__ void for_each_part(const AffinitiesCuda& p, Function function) {
#pragma unroll 1
  for (int first = 0; first < p.channels; first += RESIDENT) function(first, min(RESIDENT, p.channels - first));
}

// The affinities of a warp's positions, those past the end included. Leaves the last part of x in the tile, but for the
// vectors that use(c) replaces, which have been read.
template <typename T, int TILES, typename Use>
static __device__ __forceinline__ void find_affinities(RegionSums<TILES>& affinities, const AffinitiesCuda& p,
                                                       const Work& work, const MapRows& x, const MapTile& tile,
                                                       Use use) {
  const float* bias = p.bias + int64_t(work.b) * p.rows + work.first_row;
  const PackedRows weight(p.packed_weight, work.first_fragment_row, 8 * TILES, p.padded);
  for_each_sum<TILES>(affinities, [&](int, int j, float& sum) { sum = j < work.regions ? bias[j] : 0.0f; });
  for_each_part(p, [&](int first, int channels) {
    tile.fetch(x, first, channels);
#pragma unroll 1
    for (int c = 0; c < channels; c += STRETCH) {
      const RawRows rows = tile.read(c);
      use(c);
      add_over_channels<T, TILES>(affinities, rows, weight, first + c);
    }
  });
  for_each_sum<TILES>(affinities, [](int, int, float& sum) { sum = sigmoid_of_products(sum); });
}

// Weight and regions in both orders, vectors of float32 in rows of p.padded numbers.
struct PackFragments {
  struct Matrix {
    const float* from;  // (images, rows, channels)
    void *plain, *pairs;
    int images;
  } matrices[2];
  struct VectorRows {
    const float* from;  // (rows, channels), may be null
    float* to;          // (rows, padded)
    int rows;
  } vectors[2];
  int sizes[MAX_SCALES];
  int rows, fragment_rows, channels, padded;
};

constexpr int PACK_WARPS = 2;

// grid (rows of all), 32 * PACK_WARPS threads: a block copies a row, its warps stretches in turn
template <typename T>
__global__ void pack_fragments(const PackFragments p) {
  const Lane lane = this_lane();
  const int c = lane.g * 4 + lane.t;  // of a stretch
  int row = static_cast<int>(blockIdx.x);
  for (const auto& matrix : p.matrices) {
    if (row < matrix.images * p.fragment_rows) {
      const int64_t image = row / p.fragment_rows;
      int own = row % p.fragment_rows, first_row = 0, regions = p.sizes[0], rows = fragment_rows(regions);
#pragma unroll 1
      for (int scale = 1; own >= rows; ++scale) {
        own -= rows, first_row += regions;
        regions = p.sizes[scale], rows = fragment_rows(regions);
      }
      const int stretch = rows * STRETCH;  // numbers
      const int channels = own < regions ? p.channels : 0;
      const float* from = matrix.from + (image * p.rows + first_row + own) * p.channels + c;
      const int64_t first = int64_t(row - own) * p.padded + lane.warp * stretch;
      auto* plain = static_cast<uint16_t*>(matrix.plain) + first + own * STRETCH + c;
      auto* pairs = static_cast<uint16_t*>(matrix.pairs) + first + (own / 2 * STRETCH + pair_place(c)) * 2 + own % 2;
      for (int begin = lane.warp * STRETCH; begin < p.padded; begin += PACK_WARPS * STRETCH) {
        *plain = *pairs = static_cast<uint16_t>(round_pair<T>(begin + c < channels ? from[begin] : 0.0f, 0.0f));
        plain += PACK_WARPS * stretch, pairs += PACK_WARPS * stretch;
      }
      return;
    }
    row -= matrix.images * p.fragment_rows;
  }
  const bool second = row >= p.vectors[0].rows;
  if (second) row -= p.vectors[0].rows;
  const float* from = (second ? p.vectors[1].from : p.vectors[0].from) + int64_t(row) * p.channels;
  float* to = (second ? p.vectors[1].to : p.vectors[0].to) + int64_t(row) * p.padded;
  for (int c = static_cast<int>(threadIdx.x); c < p.padded; c += 32 * PACK_WARPS)
    to[c] = c < p.channels ? from[c] : 0.0f;
}
