// Sums over positions: every block of a large kernel leaves its own in a slice of a workspace; a small kernel after it
// adds the slices, always in the same order.
#pragma once

#include "../common/device.cuh"

// (results, slices, rows, pitch) -> (results, rows, columns)
struct Slices {
  const float* from;
  float* to;
  int results, slices, rows, pitch, columns;
};

constexpr int MAX_MERGES = 5, MERGE_COLUMNS = 32, MERGE_PARTS = 8;
struct MergeCuda {
  Slices of[MAX_MERGES];
};
constexpr int MERGE_SHARED_BYTES = MERGE_COLUMNS * MERGE_PARTS * sizeof(float);

// grid (stretches of MERGE_COLUMNS columns, merges), MERGE_COLUMNS * MERGE_PARTS threads: each part takes every
// MERGE_PARTS-th slice
static __global__ void merge_slices(const MergeCuda p) {
  SHARED_BUFFER(shared);
  float* parts = reinterpret_cast<float*>(shared);  // [MERGE_PARTS][MERGE_COLUMNS]
  const Slices& s = p.of[blockIdx.y];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % MERGE_COLUMNS, part = thread / MERGE_COLUMNS;
  const int across = (s.columns + MERGE_COLUMNS - 1) / MERGE_COLUMNS, block = static_cast<int>(blockIdx.x);
  const int result = block / (s.rows * across), row = block / across % s.rows;
  const int column = block % across * MERGE_COLUMNS + lane;
  const bool inside = result < s.results && column < s.columns;  // the grid is the largest merge's
  float sum = 0;
  if (inside) {
    const int64_t step = int64_t(s.rows) * s.pitch;
    const float* from = s.from + int64_t(result) * s.slices * step + int64_t(row) * s.pitch + column;
#pragma unroll 4
    for (int slice = part; slice < s.slices; slice += MERGE_PARTS) sum += from[slice * step];
  }
  parts[part * MERGE_COLUMNS + lane] = sum;
  __syncthreads();
  if (inside && part == 0) {
    for (int other = 1; other < MERGE_PARTS; ++other) sum += parts[other * MERGE_COLUMNS + lane];
    s.to[(int64_t(result) * s.rows + row) * s.columns + column] = sum;
  }
}
