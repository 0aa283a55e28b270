// A CUDA block on one CPU thread: enough of the language for the kernel bodies in csrc/**/*.cuh to run under g++.
//
// Every CUDA thread is a fiber. It runs until it meets a barrier or a shuffle, or ends; then another one of its warp
// runs, picked at random, and now and then another warp is. So a thread that reads what another has not yet written
// gets poison (shared memory starts as NaN), and one that overwrites what another has yet to read spoils it: a missing
// __syncthreads shows. A barrier that some threads never reach is an error, and so is a write past the end of shared
// memory.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../../csrc/common/kernel_cpu.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED_BUFFER(name) unsigned char* name = emulation::shared_buffer

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

namespace emulation {

constexpr size_t STACK = 128 * 1024, CANARY = 64;
constexpr unsigned char POISON = 0xff;  // NaN as a float, -1 as an integer
constexpr unsigned WARP = 32;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
};

inline unsigned char* shared_buffer;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned running;
inline void (*body)(const void*);
inline const void* body_argument;
inline std::exception_ptr failure;

inline void wait(State at) {
  fibers[running].state = at;
  swapcontext(&fibers[running].context, &scheduler);
}

inline void run_body() {
  try {
    body(body_argument);
  } catch (...) {
    failure = std::current_exception();  // it cannot leave the fiber's stack: run_block throws it again
  }
  wait(State::done);
}

// Lets the threads go on that have all reached their barrier.
inline bool release(unsigned begin, unsigned end, State barrier) {
  for (unsigned t = begin; t < end; ++t)
    if (fibers[t].state != barrier) return false;
  for (unsigned t = begin; t < end; ++t) fibers[t].state = State::ready;
  return true;
}

inline void run_block(unsigned threads, std::mt19937& random) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.state = State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_body, 0);
  }
  std::vector<unsigned> warps, ready;
  for (;;) {
    // One warp at a time, and mostly on from one shuffle to the next: it may be far ahead while others have yet to
    // begin.
    warps.clear();
    for (unsigned t = 0; t < threads; ++t)
      if (fibers[t].state == State::ready && (warps.empty() || warps.back() != t / WARP)) warps.push_back(t / WARP);
    if (warps.empty()) {
      if (release(0, threads, State::at_block_barrier)) continue;
      for (unsigned t = 0; t < threads; ++t)
        if (fibers[t].state != State::done) throw std::runtime_error("a barrier was not reached by every thread");
      return;
    }
    const unsigned begin = warps[random() % warps.size()] * WARP, end = min(begin + WARP, threads);
    do {
      ready.clear();
      for (unsigned t = begin; t < end; ++t)
        if (fibers[t].state == State::ready) ready.push_back(t);
      std::shuffle(ready.begin(), ready.end(), random);
      for (unsigned t : ready) {
        running = t;
        threadIdx.x = t;
        swapcontext(&scheduler, &fibers[t].context);
        if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      }
    } while (release(begin, end, State::at_warp_barrier) && random() % 8 != 0);
  }
}

// A launcher with the signature that csrc/**/*_launch.h expect.
struct Launch {
  uint32_t seed;

  template <typename Params>
  void operator()(void (*kernel)(Params), int grid_x, int grid_y, int threads, int shared_bytes,
                  const Params& p) const {
    std::mt19937 random(seed);
    const std::pair<void (*)(Params), Params> call(kernel, p);
    body = [](const void* argument) {
      const auto& [function, params] = *static_cast<const std::pair<void (*)(Params), Params>*>(argument);
      function(params);
    };
    body_argument = &call;
    fibers.resize(std::max<size_t>(fibers.size(), threads));
    blockDim = {unsigned(threads)}, gridDim = {unsigned(grid_x), unsigned(grid_y)};
    std::vector<unsigned char> shared(shared_bytes + CANARY);
    shared_buffer = shared.data();
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        std::fill(shared.begin(), shared.end(), POISON);
        run_block(threads, random);
        if (std::any_of(shared.end() - CANARY, shared.end(), [](unsigned char byte) { return byte != POISON; }))
          throw std::runtime_error("a kernel wrote past the end of its shared memory");
      }
  }
};

// Memory for a kernel's intermediate results, poisoned.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : memory_((bytes + sizeof(double) - 1) / sizeof(double)) {
    std::memset(memory_.data(), POISON, memory_.size() * sizeof(double));
  }
  void* data() { return memory_.data(); }

 private:
  std::vector<double> memory_;
};

inline uint64_t exchanged[1024];  // what each thread of a block offers in a shuffle

template <typename T>
T shuffle(unsigned mask, T value, unsigned source_lane) {
  if (mask != 0xffffffffu) throw std::runtime_error("shuffles take the full mask");
  const unsigned thread = running;
  std::memcpy(&exchanged[thread], &value, sizeof(T));
  wait(State::at_warp_barrier);
  std::memcpy(&value, &exchanged[thread / WARP * WARP + source_lane % WARP], sizeof(T));
  wait(State::at_warp_barrier);
  return value;
}

}  // namespace emulation

// A GPU faults where a vector does not start at a multiple of its size; a CPU would not notice.
inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) throw std::runtime_error("a vector is not aligned");
}

inline void __syncthreads() { emulation::wait(emulation::State::at_block_barrier); }
inline void __syncwarp() { emulation::wait(emulation::State::at_warp_barrier); }
template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned lane) {
  return emulation::shuffle(mask, value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return emulation::shuffle(mask, value, (emulation::running % emulation::WARP) ^ lanes);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = emulation::running % emulation::WARP;
  return emulation::shuffle(mask, value, lane + by < emulation::WARP ? lane + by : lane);
}
