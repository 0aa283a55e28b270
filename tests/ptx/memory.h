// Memory with a shadow: every byte of shared memory and of every tensor knows who wrote and read it last, and when.
//
// Time inside a block is counted in barriers, its epoch. Two accesses of different warps in one epoch, one of them a
// write, are a race, in whatever order they happened to run. So are two accesses of different blocks of a launch, one
// of them a write, unless both are atomic. Warps of a block may write the same value to one place: Triton does, where
// several warps hold copies of a tile, and every order has the same result. Lanes of a warp are no more in step than
// warps are: between them, a barrier of the warp or the block has to stand.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

struct Cell {
  uint32_t writer_block = 0;  // 1 + its number; 0: nobody has written in this launch
  uint32_t write_epoch = 0;
  uint32_t writers = 0;  // warps of that block and epoch that have written what is there now
  uint32_t reader_block = 0;
  uint32_t read_epoch = 0;
  uint32_t readers = 0;  // warps of that block and epoch
  // The lanes of the last warp that did, and when as that warp counts its own barriers.
  uint32_t writing_lanes = 0, reading_lanes = 0, write_turn = 0, read_turn = 0;
  uint8_t writing_warp = 0, reading_warp = 0;
  uint32_t write_fences = 0;  // fences of that warp before its write
  int32_t write_pc = -1, read_pc = -1;
  bool atomic = false;
  bool initialised = false;  // shared memory; tensors have flags
  bool pending = false;      // a cp.async has begun and nobody has waited
};
constexpr uint32_t SEVERAL_BLOCKS = ~0u;

// Spreads a number over 64 bits, so that sums of such tell apart what was added.
inline uint64_t mixed(uint64_t number) {
  number = (number + 1) * 0x9e3779b97f4a7c15;
  return number ^ number >> 29;
}

enum Flag : uint8_t { addressable = 1, writable = 2, initialised = 4, was_read = 8, was_written = 16 };

// A buffer and the bytes around it. Bytes without `addressable` are its red zones: those before and behind it, and
// those between the elements of a tensor that is a window of a larger one.
struct Region {
  std::string name;
  uint64_t begin, size;
  uint64_t origin;  // the tensor's first element
  bool is_output;
  std::vector<uint8_t> flags;
  std::vector<Cell> cells;  // of outputs, renewed by every launch
};

struct Finding {
  std::string kind, kernel, text, source, tensor, detail;
  int line = 0;
  uint32_t block_x = 0, block_y = 0, block_z = 0, warp = 0, lane = 0;
  uint64_t address = 0;
};

struct Counts {
  std::vector<uint64_t> executed;  // warps' instructions, by their place in the code
  std::vector<uint64_t> lanes;     // lanes' instructions
  std::vector<uint64_t> sums;      // of what they left in the first register, each number mixed
  uint64_t global_read_bytes = 0, global_written_bytes = 0, global_read_sectors = 0, global_written_sectors = 0;
  uint64_t addresses = 0;  // the sum of all that was accessed, each mixed with its instruction
  uint64_t shared_accesses = 0, bank_conflicts = 0, barriers = 0, blocks = 0;
};

}  // namespace ptx
