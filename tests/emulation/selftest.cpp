// Kernels with planted faults, each of which the emulation has to notice, and tensor core products.
#include "../../csrc/common/mma.cuh"
#include "arrays.h"

namespace {

struct Params {
  float* out;  // one number for each thread
  bool with_barrier;
};

// Every thread reads its neighbour's number: wrong without the barrier.
void neighbour(Params p) {
  SHARED_BUFFER(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  numbers[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (p.with_barrier) __syncthreads();
  p.out[threadIdx.x] = numbers[(threadIdx.x + 1) % blockDim.x];
}

// Every thread reads the number of one in the other warp, with a barrier for its own warp only.
void other_warp(Params p) {
  SHARED_BUFFER(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  numbers[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp();
  p.out[threadIdx.x] = numbers[(threadIdx.x + 32) % blockDim.x];
}

// A sum over each warp.
void warp_sum(Params p) {
  float sum = static_cast<float>(threadIdx.x);
  for (unsigned lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  p.out[threadIdx.x] = sum;
}

// Half of the threads leave before the barrier.
void early_return(Params p) {
  if (threadIdx.x % 2 == 0) return;
  __syncthreads();
  p.out[threadIdx.x] = 0;
}

void partial_mask(Params p) { p.out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }

// Every thread gets the number of the one two lanes up, the last two of a warp keep theirs.
void shuffle_down(Params p) {
  __syncwarp();
  p.out[threadIdx.x] = __shfl_down_sync(0xffffffffu, static_cast<float>(threadIdx.x), 2);
}

void misaligned(Params p) { load_vector<4>(p.out + 1); }

void overrun(Params) {
  SHARED_BUFFER(shared);
  reinterpret_cast<float*>(shared)[blockDim.x] = 0;
}

py::array_t<float> run(void (*kernel)(Params), bool with_barrier, uint32_t seed) {
  py::array_t<float> out(64);
  emulation::Launch{seed}(kernel, 1, 1, 64, 64 * sizeof(float), Params{out.mutable_data(), with_barrier});
  return out;
}

// 16x16 numbers, rows 24 apart as they might lie in a padded tile.
constexpr int SIDE = 16, PITCH = 24;

template <typename T>
struct Product {
  const T *a, *b;
  float* c;         // of every warp
  uint32_t* parts;  // of a, four for each lane
};

template <typename T>
T* copy_to(unsigned char* shared, const T* from) {
  T* tile = reinterpret_cast<T*>(shared);
  for (int i = static_cast<int>(threadIdx.x); i < SIDE * SIDE; i += static_cast<int>(blockDim.x))
    tile[i / SIDE * PITCH + i % SIDE] = from[i];
  return tile;
}

// Every warp adds a·b twice, a and b lying by rows or by columns.
template <typename T, bool a_by_row, bool b_by_row>
void warp_product(Product<T> p) {
  SHARED_BUFFER(shared);
  const T* a = copy_to(shared, p.a);
  const T* b = copy_to(shared + SIDE * PITCH * sizeof(T), p.b);
  __syncthreads();
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t left[4], right[4];
  load_a<a_by_row>(left, a, PITCH);
  load_two_b<b_by_row>(right, b, PITCH);
  float c[8] = {};
  for (int i = 0; i < 2; ++i) {
    multiply_add<T>(c, left, right);
    multiply_add<T>(c + 4, left, right + 2);
  }
  for (unsigned i = 0; i < 8; ++i)
    p.c[warp * SIDE * SIDE + (lane / 4 + i % 4 / 2 * 8) * SIDE + i / 4 * 8 + lane % 4 * 2 + i % 2] = c[i];
  for (unsigned i = 0; i < 4; ++i) p.parts[threadIdx.x * 4 + i] = left[i];
}

template <typename T>
py::tuple run_product(const py::array& a, const py::array& b, bool a_by_row, bool b_by_row, uint32_t seed) {
  py::array_t<float> c({2, SIDE, SIDE});
  py::array_t<uint32_t> parts({64, 4});
  const Product<T> p{static_cast<const T*>(a.data()), static_cast<const T*>(b.data()), c.mutable_data(),
                     parts.mutable_data()};
  const auto kernel = a_by_row ? (b_by_row ? warp_product<T, true, true> : warp_product<T, true, false>)
                               : (b_by_row ? warp_product<T, false, true> : warp_product<T, false, false>);
  emulation::Launch{seed}(kernel, 1, 1, 64, 2 * SIDE * PITCH * sizeof(T), p);
  return py::make_tuple(c, parts);
}

}  // namespace

void bind_selftest(py::module_& module) {
  module.def("neighbour", [](bool with_barrier, uint32_t seed) { return run(neighbour, with_barrier, seed); });
  module.def("other_warp", [](uint32_t seed) { return run(other_warp, true, seed); });
  module.def("warp_sum", [](uint32_t seed) { return run(warp_sum, true, seed); });
  module.def("early_return", [](uint32_t seed) { return run(early_return, true, seed); });
  module.def("partial_mask", [](uint32_t seed) { return run(partial_mask, true, seed); });
  module.def("shuffle_down", [](uint32_t seed) { return run(shuffle_down, true, seed); });
  module.def("misaligned", [](uint32_t seed) { return run(misaligned, true, seed); });
  module.def("overrun", [](uint32_t seed) { return run(overrun, true, seed); });
  module.def("warp_product",
             [](py::array a, py::array b, const std::string& dtype, bool a_by_row, bool b_by_row, uint32_t seed) {
               return dtype == "bfloat16" ? run_product<BFloat16>(a, b, a_by_row, b_by_row, seed)
                                          : run_product<Half>(a, b, a_by_row, b_by_row, seed);
             });
}
