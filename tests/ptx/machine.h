// The machine that runs a launch: its blocks, their warps, what they share, and what was found.
#pragma once

#include <array>
#include <deque>
#include <random>
#include <set>

#include "memory.h"
#include "program.h"

namespace ptx {

struct Machine;

struct Dimensions {
  uint32_t x = 1, y = 1, z = 1;
};

struct Block {
  Machine* machine;
  uint32_t number;
  Dimensions index;
  uint32_t epoch = 1;
  std::vector<uint8_t> shared;
  std::vector<Cell> cells;
  std::vector<std::unique_ptr<Warp>> warps;
};

// Lanes of a warp at one instruction. Those at the lowest instruction run; where two groups meet they become one.
struct Group {
  int pc;
  uint32_t mask;
  bool blocked;  // at an instruction that waits for other lanes
};

// A cp.async of one lane: it arrives when the lane waits for it.
struct Copy {
  uint32_t to, bytes, from_bytes;
  uint64_t from;
  int pc;
};

// wgmma: products that have begun. Their results come into their registers, and their reading of shared memory ends,
// when the warp waits for their group.
struct AsyncProducts {
  struct Group {
    std::vector<std::pair<int, std::array<uint64_t, LANES>>> results;  // by register
    std::vector<std::pair<uint32_t, uint32_t>> read;                   // address, bytes
    uint32_t epoch = 0;
    int pc = 0;
  };
  Group uncommitted;
  std::deque<Group> committed;
  bool fenced = false;  // wgmma.fence since registers were last the warp's own
};

struct Warp {
  Block* block;
  const Kernel* kernel;
  uint32_t index, lanes, started;  // lanes that run still, and those that there were
  std::vector<uint64_t> registers;
  std::vector<Group> groups;
  bool at_barrier = false;
  uint32_t fences = 0, fence_epoch = 0;  // fence.proxy.async: how many so far, and the epoch of the last
  uint32_t turn = 0;                     // barriers of the warp or the block so far
  int pc = 0;                            // of the instruction that runs
  std::array<std::vector<Copy>, LANES> uncommitted;
  std::array<std::deque<std::vector<Copy>>, LANES> committed;
  AsyncProducts products;  // wgmma

  const uint64_t* read(int operand) const {
    return operand >= 0 ? &registers[size_t(operand) * LANES] : &kernel->constants[size_t(~operand) * LANES];
  }
  uint64_t* write(int operand) { return &registers[size_t(operand) * LANES]; }
};

struct Machine {
  // What a launch is given.
  const Module* module = nullptr;
  const Kernel* kernel = nullptr;
  Dimensions grid, threads;
  std::vector<uint8_t> parameters;
  uint32_t shared_bytes = 0;
  uint64_t seed = 0;
  bool counting = false;
  uint64_t budget = 0;       // instructions before a launch counts as endless
  bool one_finding = false;  // whether the first finding ends the launch

  std::vector<Region> regions;  // by address
  size_t last_region = 0;
  std::vector<Finding> findings;
  std::set<std::pair<std::string, int>> found;  // kind and instruction: each is told once
  Counts counts;
  std::mt19937_64 random;

  void run();
  void report(const std::string& kind, const Warp& warp, uint32_t lane, uint64_t address, const std::string& tensor,
              const std::string& detail);

  // Where `bytes` at an address of a tensor are, after all checks; null if they may not be touched. values: what a
  // write brings. used: the bytes that count. A write of shared memory without values is one yet to come.
  uint8_t* global(Warp& warp, uint32_t lane, uint64_t address, uint32_t bytes, const uint8_t* values, bool atomic,
                  uint64_t used);
  uint8_t* shared(Warp& warp, uint32_t lane, uint64_t address, uint32_t bytes, bool write, const uint8_t* values,
                  uint64_t used);

 private:
  bool run_warp(Warp& warp, int memory_operations);
  void start_block(uint32_t number);
  bool release_barrier(Block& block);
  void add_results(const Warp& warp, const Instruction& instruction, uint32_t mask);
  std::vector<std::unique_ptr<Block>> resident_;
  uint64_t executed_ = 0;
};

// Calls function(lane) for every lane of a mask.
template <typename Function>
void for_lanes(uint32_t mask, Function function) {
  for (; mask; mask &= mask - 1) function(static_cast<unsigned>(__builtin_ctz(mask)));
}

}  // namespace ptx
