// Every access to a tensor or to shared memory comes through here and is checked: bounds, alignment, what was never
// written, races.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

std::string hex(uint64_t number) {
  static const char* const DIGITS = "0123456789abcdef";
  std::string text;
  do text.insert(text.begin(), DIGITS[number & 15]);
  while (number >>= 4);
  return "0x" + text;
}

struct Access {
  bool write, atomic;
  bool same_value;  // a write that changes nothing
};

// Compares an access with those before it and takes note of it. Returns what is wrong, or null.
const char* race(Cell& cell, const Warp& warp, unsigned lane, Access access, int& other_pc) {
  const uint32_t block = warp.block->number + 1, epoch = warp.block->epoch, bit = 1u << warp.index;
  const bool now = cell.writer_block == block && cell.write_epoch == epoch;
  const bool written_in_turn = now && cell.writing_warp == warp.index && cell.write_turn == warp.turn;
  const bool read_in_turn = cell.reader_block == block && cell.read_epoch == epoch && cell.reading_warp == warp.index &&
                            cell.read_turn == warp.turn && cell.readers;
  const uint32_t own = 1u << lane;
  const char* fault = nullptr;
  if (cell.writer_block != 0 && !(access.atomic && cell.atomic)) {
    if (cell.writer_block != block)
      fault = "race between blocks";
    else if (now && (access.write ? (cell.writers & ~bit) && !access.same_value : !(cell.writers & bit)))
      fault = "race between warps";
    else if (written_in_turn &&
             (access.write ? (cell.writing_lanes & ~own) && !access.same_value : !(cell.writing_lanes & own)))
      fault = "race between lanes";
    if (fault) other_pc = cell.write_pc;
  }
  if (access.write && !fault && cell.readers) {
    if (cell.reader_block != block)
      fault = "race between blocks";
    else if (cell.read_epoch == epoch && (cell.readers & ~bit) && !access.same_value)
      fault = "race between warps";
    else if (read_in_turn && (cell.reading_lanes & ~own) && !access.same_value)
      fault = "race between lanes";
    if (fault) other_pc = cell.read_pc;
  }
  if (access.write) {
    cell.writers = (now && access.same_value ? cell.writers : 0) | bit;
    cell.writing_lanes = (written_in_turn && access.same_value ? cell.writing_lanes : 0) | own;
    cell.writing_warp = static_cast<uint8_t>(warp.index), cell.write_turn = warp.turn;
    cell.write_fences = warp.fences;
    cell.writer_block = block, cell.write_epoch = epoch, cell.write_pc = warp.pc, cell.atomic = access.atomic;
  } else if (cell.readers && cell.reader_block != block) {
    cell.reader_block = SEVERAL_BLOCKS;
  } else {
    cell.reading_lanes = (read_in_turn ? cell.reading_lanes : 0) | own;
    cell.reading_warp = static_cast<uint8_t>(warp.index), cell.read_turn = warp.turn;
    cell.readers = (cell.readers && cell.read_epoch == epoch ? cell.readers : 0) | bit;
    cell.reader_block = block, cell.read_epoch = epoch, cell.read_pc = warp.pc;
  }
  return fault;
}

std::string line_of(const Warp& warp, int pc) {
  return pc < 0 ? "" : "the other access is line " + std::to_string(warp.kernel->lines[static_cast<size_t>(pc)]);
}

}  // namespace

void Machine::report(const std::string& kind, const Warp& warp, uint32_t lane, uint64_t address,
                     const std::string& tensor, const std::string& detail) {
  if (!found.emplace(kind, warp.pc).second) return;
  const size_t pc = static_cast<size_t>(warp.pc);
  Finding finding{kind, kernel->name, "", "", tensor, detail};
  finding.line = kernel->lines[pc];
  finding.text = module->text[static_cast<size_t>(finding.line) - 1];
  finding.text.erase(0, std::min(finding.text.size(), finding.text.find_first_not_of(" \t")));
  finding.source = kernel->places[static_cast<size_t>(kernel->code[pc].place)].source;
  const Dimensions& at = warp.block->index;
  finding.block_x = at.x, finding.block_y = at.y, finding.block_z = at.z;
  finding.warp = warp.index, finding.lane = lane, finding.address = address;
  findings.push_back(finding);
}

uint8_t* Machine::global(Warp& warp, uint32_t lane, uint64_t address, uint32_t bytes, const uint8_t* values,
                         bool atomic, uint64_t used) {
  if (counting) counts.addresses += mixed(address ^ static_cast<uint64_t>(warp.pc) << 48);
  const bool write = values != nullptr || atomic;
  const auto holds = [&](const Region& region) { return address - region.begin < region.size; };
  if (last_region >= regions.size() || !holds(regions[last_region])) {
    const auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                        [](uint64_t a, const Region& region) { return a < region.begin; });
    if (after == regions.begin() || !holds(*(after - 1))) {
      report("out of bounds", warp, lane, address, "", "no tensor is near");
      return nullptr;
    }
    last_region = static_cast<size_t>(after - 1 - regions.begin());
  }
  Region& region = regions[last_region];
  const auto where = [&](uint64_t at) {
    const int64_t offset = static_cast<int64_t>(at - region.origin);
    return "byte " + std::to_string(offset) + " from its first element";
  };
  if (address % bytes != 0) {
    report("misaligned", warp, lane, address, region.name,
           where(address) + ", " + hex(address) + ", in " + std::to_string(bytes) + " bytes");
    return nullptr;
  }
  const uint64_t first = address - region.begin;
  if (first + bytes > region.size) {
    report("out of bounds", warp, lane, address, region.name, where(address));
    return nullptr;
  }
  uint8_t* flags = &region.flags[first];
  bool all_written = true;
  for (uint32_t i = 0; i < bytes; ++i) {
    if (!(used >> i & 1)) continue;
    if (!(flags[i] & addressable)) {
      report("out of bounds", warp, lane, address + i, region.name, where(address + i));
      return nullptr;
    }
    all_written &= (flags[i] & initialised) != 0;
    if (write && !(flags[i] & writable)) {
      report("store to an input", warp, lane, address + i, region.name, where(address + i));
      return nullptr;
    }
  }
  if ((!write || atomic) && !all_written)
    report("read of memory nobody wrote", warp, lane, address, region.name, where(address));
  const uint8_t* data = reinterpret_cast<const uint8_t*>(address);
  const auto same = [&](uint32_t i) { return values && (flags[i] & initialised) && values[i] == data[i]; };
  if (region.is_output)
    for (uint32_t i = 0; i < bytes; ++i) {
      if (!(used >> i & 1)) continue;
      int other = -1;
      if (const char* fault = race(region.cells[first + i], warp, lane, {write, atomic, same(i)}, other))
        report(fault, warp, lane, address + i, region.name, where(address + i) + "; " + line_of(warp, other));
    }
  for (uint32_t i = 0; i < bytes; ++i)
    if (used >> i & 1) flags[i] |= write ? initialised | was_written : was_read;
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* Machine::shared(Warp& warp, uint32_t lane, uint64_t address, uint32_t bytes, bool write, const uint8_t* values,
                         uint64_t used) {
  if (counting) counts.addresses += mixed(address ^ static_cast<uint64_t>(warp.pc) << 48);
  Block& block = *warp.block;
  if (address + bytes > block.shared.size()) {
    report("out of bounds", warp, lane, address, "shared memory",
           "of " + std::to_string(block.shared.size()) + " bytes");
    return nullptr;
  }
  if (address % bytes != 0) {
    report("misaligned", warp, lane, address, "shared memory", "in " + std::to_string(bytes) + " bytes");
    return nullptr;
  }
  for (uint32_t i = 0; i < bytes; ++i) {
    if (!(used >> i & 1)) continue;
    Cell& cell = block.cells[address + i];
    if (cell.pending)
      report("cp.async without a wait", warp, lane, address + i, "shared memory", line_of(warp, cell.write_pc));
    else if (!write && !cell.initialised)
      report("read of memory nobody wrote", warp, lane, address + i, "shared memory", "");
    const bool same = values && cell.initialised && values[i] == block.shared[address + i];
    int other = -1;
    if (const char* fault = race(cell, warp, lane, {write, false, same}, other))
      report(fault, warp, lane, address + i, "shared memory", line_of(warp, other));
    if (write) cell.initialised = true;
  }
  return &block.shared[address];
}

}  // namespace ptx
