// Loads, stores, atomics, cp.async, ldmatrix and stmatrix.
#include <algorithm>

#include "forms.h"

namespace ptx {
namespace {

constexpr uint32_t MOST_BYTES = 32;  // of a lane's access

enum class Space { global, shared, parameters };

// Counts sectors of 32 bytes that an access touches, or the turns that its banks of 4 bytes take beyond the fewest.
template <Space space>
void count(Warp& warp, uint32_t mask, const uint64_t* addresses, uint32_t bytes, bool write) {
  Counts& counts = warp.block->machine->counts;
  std::array<uint64_t, LANES * 2> units;
  size_t n = 0;
  if constexpr (space == Space::global) {
    for_lanes(mask, [&](unsigned lane) {
      for (uint64_t s = addresses[lane] / 32; s <= (addresses[lane] + bytes - 1) / 32; ++s) units[n++] = s;
    });
    std::sort(units.begin(), units.begin() + n);
    const size_t sectors = static_cast<size_t>(std::unique(units.begin(), units.begin() + n) - units.begin());
    const uint64_t moved = static_cast<uint64_t>(__builtin_popcount(mask)) * bytes;
    (write ? counts.global_written_sectors : counts.global_read_sectors) += sectors;
    (write ? counts.global_written_bytes : counts.global_read_bytes) += moved;
  } else {
    const unsigned phases = bytes <= 4 ? 1 : bytes / 4, step = LANES / phases;
    for (unsigned first = 0; first < LANES; first += step) {
      const uint32_t part = mask & (step == 32 ? ALL_LANES : ((1u << step) - 1) << first);
      std::array<std::vector<uint64_t>, 32> words;
      size_t turns = 0;
      for_lanes(part, [&](unsigned lane) {
        for (uint64_t word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word) {
          auto& bank = words[word % 32];
          if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
          turns = std::max(turns, bank.size());
        }
      });
      if (turns) counts.shared_accesses += 1, counts.bank_conflicts += turns - 1;
    }
  }
}

template <Space space>
uint64_t address_of(uint64_t base, int64_t offset) {
  const uint64_t address = base + static_cast<uint64_t>(offset);
  return space == Space::global ? address : address & 0xffffffffu;
}

template <Space space>
uint8_t* locate(Warp& warp, unsigned lane, uint64_t address, uint32_t bytes, const uint8_t* values, uint64_t used) {
  Machine& machine = *warp.block->machine;
  if constexpr (space == Space::global) return machine.global(warp, lane, address, bytes, values, false, used);
  if constexpr (space == Space::shared)
    return machine.shared(warp, lane, address, bytes, values != nullptr, values, used);
  if (address + bytes <= machine.parameters.size()) return machine.parameters.data() + address;
  machine.report("out of bounds", warp, lane, address, "the parameters", "");
  return nullptr;
}

template <Space space, typename T>
Form load() {
  return {space == Space::parameters ? Kind::plain : Kind::memory,
          [](Warp& warp, const Instruction& instruction, uint32_t mask) {
            std::array<uint64_t, LANES> addresses;
            const uint64_t* base = warp.read(instruction.operands[instruction.count]);
            const uint32_t bytes = sizeof(T) * instruction.count;
            for_lanes(mask, [&](unsigned lane) {
              addresses[lane] = address_of<space>(base[lane], instruction.offset);
              const uint8_t* from = locate<space>(warp, lane, addresses[lane], bytes, nullptr, instruction.used_bytes);
              for (unsigned i = 0; i < instruction.count; ++i) {
                T value;
                if (from)
                  std::memcpy(&value, from + i * sizeof(T), sizeof(T));
                else
                  std::memset(&value, 0xff, sizeof(T));
                warp.write(instruction.operands[i])[lane] = bits_of(value);
              }
            });
            if (space != Space::parameters && warp.block->machine->counting)
              count<space>(warp, mask, addresses.data(), bytes, false);
          },
          -1};
}

template <Space space, typename T>
Form store() {
  return {Kind::memory,
          [](Warp& warp, const Instruction& instruction, uint32_t mask) {
            std::array<uint64_t, LANES> addresses;
            const uint64_t* base = warp.read(instruction.operands[0]);
            const uint32_t bytes = sizeof(T) * instruction.count;
            uint8_t values[LANES][MOST_BYTES];
            for_lanes(mask, [&](unsigned lane) {
              addresses[lane] = address_of<space>(base[lane], instruction.offset);
              for (unsigned i = 0; i < instruction.count; ++i) {
                const T value = value_of<T>(warp.read(instruction.operands[1 + i])[lane]);
                std::memcpy(values[lane] + i * sizeof(T), &value, sizeof(T));
              }
              uint8_t* to = locate<space>(warp, lane, addresses[lane], bytes, values[lane], ~0ull);
              if (to) std::memcpy(to, values[lane], bytes);
            });
            if (warp.block->machine->counting) count<space>(warp, mask, addresses.data(), bytes, true);
          },
          -1};
}

// atom returns what it found, in its first operand; red does not.
template <typename T, bool returns>
Form atomic_add() {
  return {Kind::memory,
          [](Warp& warp, const Instruction& instruction, uint32_t mask) {
            const uint64_t* base = warp.read(instruction.operands[returns]);
            for_lanes(mask, [&](unsigned lane) {
              const uint64_t address = base[lane] + static_cast<uint64_t>(instruction.offset);
              const T by = value_of<T>(warp.read(instruction.operands[returns + 1])[lane]);
              T old{};
              if (uint8_t* at = warp.block->machine->global(warp, lane, address, sizeof(T), nullptr, true, ~0ull)) {
                std::memcpy(&old, at, sizeof(T));
                const T sum = old + by;
                std::memcpy(at, &sum, sizeof(T));
              }
              if constexpr (returns) warp.write(instruction.operands[0])[lane] = bits_of(old);
            });
          },
          returns + 2};
}

void copy_async(Warp& warp, const Instruction& instruction, uint32_t mask) {
  Machine& machine = *warp.block->machine;
  std::array<uint64_t, LANES> sources;
  uint32_t reading = 0, bytes = 0;
  for_lanes(mask, [&](unsigned lane) {
    Copy copy{};
    copy.pc = warp.pc;
    copy.to =
        static_cast<uint32_t>(address_of<Space::shared>(warp.read(instruction.operands[0])[lane], instruction.offset));
    copy.from = sources[lane] =
        warp.read(instruction.operands[1])[lane] + static_cast<uint64_t>(instruction.second_offset);
    copy.bytes = bytes = static_cast<uint32_t>(warp.read(instruction.operands[2])[lane]);
    copy.from_bytes = copy.bytes;
    if (instruction.operands.size() == 4)
      copy.from_bytes = static_cast<uint32_t>(warp.read(instruction.operands[3])[lane]);
    if (copy.from_bytes > copy.bytes)
      machine.report("cp.async of more bytes than it writes", warp, lane, copy.from, "", "");
    const uint64_t used = copy.from_bytes >= 64 ? ~0ull : (1ull << copy.from_bytes) - 1;
    if (copy.from_bytes > 0) {
      reading |= 1u << lane;
      if (!machine.global(warp, lane, copy.from, copy.bytes, nullptr, false, used)) return;
    }
    if (!machine.shared(warp, lane, copy.to, copy.bytes, true, nullptr, ~0ull)) return;
    for (uint32_t i = 0; i < copy.bytes; ++i) warp.block->cells[copy.to + i].pending = true;
    warp.uncommitted[lane].push_back(copy);
  });
  if (machine.counting) count<Space::global>(warp, reading, sources.data(), bytes, false);
}

void arrive(Warp& warp, unsigned lane, const Copy& copy) {
  Block& block = *warp.block;
  for (uint32_t i = 0; i < copy.bytes; ++i) block.cells[copy.to + i].pending = false;
  uint8_t values[MOST_BYTES]{};
  std::memcpy(values, reinterpret_cast<const void*>(copy.from), copy.from_bytes);
  const int pc = std::exchange(warp.pc, copy.pc);
  std::memcpy(block.machine->shared(warp, lane, copy.to, copy.bytes, true, values, ~0ull), values, copy.bytes);
  warp.pc = pc;
}

void wait_for_copies(Warp& warp, uint32_t mask, size_t allowed) {
  for_lanes(mask, [&](unsigned lane) {
    auto& groups = warp.committed[lane];
    while (groups.size() > allowed) {
      for (const Copy& copy : groups.front()) arrive(warp, lane, copy);
      groups.pop_front();
    }
  });
}

// The addresses of rows come from lanes 0 to 7, of each matrix; every lane holds two neighbours of each one's rows.
template <unsigned matrices, bool transposed, bool storing>
Form matrices_8x8() {
  return {Kind::convergent,
          [](Warp& warp, const Instruction& instruction, uint32_t mask) {
            Machine& machine = *warp.block->machine;
            const unsigned address_operand = storing ? 0 : matrices, first = storing ? 1 : 0;
            uint8_t rows[matrices * 8][16];
            std::array<uint64_t, LANES> addresses{};
            for (unsigned row = 0; row < matrices * 8; ++row)
              addresses[row] =
                  address_of<Space::shared>(warp.read(instruction.operands[address_operand])[row], instruction.offset);
            const auto element = [&](unsigned matrix, unsigned lane, unsigned i) {
              const unsigned row = lane / 4, column = lane % 4 * 2 + i;
              return transposed ? rows[matrix * 8 + column] + 2 * row : rows[matrix * 8 + row] + 2 * column;
            };
            if (storing)
              for (unsigned matrix = 0; matrix < matrices; ++matrix)
                for_lanes(mask, [&](unsigned lane) {
                  const uint64_t part = warp.read(instruction.operands[first + matrix])[lane];
                  for (unsigned i = 0; i < 2; ++i) {
                    const uint16_t bits = static_cast<uint16_t>(part >> 16 * i);
                    std::memcpy(element(matrix, lane, i), &bits, 2);
                  }
                });
            for (unsigned row = 0; row < matrices * 8; ++row) {
              uint8_t* at =
                  machine.shared(warp, row, addresses[row], 16, storing, storing ? rows[row] : nullptr, ~0ull);
              if (storing && at) std::memcpy(at, rows[row], 16);
              if (!storing && at) std::memcpy(rows[row], at, 16);
              if (!storing && !at) std::memset(rows[row], 0xff, 16);
            }
            if (!storing)
              for (unsigned matrix = 0; matrix < matrices; ++matrix)
                for_lanes(mask, [&](unsigned lane) {
                  uint32_t part = 0;
                  for (unsigned i = 0; i < 2; ++i) {
                    uint16_t bits;
                    std::memcpy(&bits, element(matrix, lane, i), 2);
                    part |= static_cast<uint32_t>(bits) << 16 * i;
                  }
                  warp.write(instruction.operands[first + matrix])[lane] = part;
                });
            if (machine.counting)
              for (unsigned matrix = 0; matrix < matrices; ++matrix)
                count<Space::shared>(warp, 0xffu << 8 * matrix, addresses.data(), 16, storing);
          },
          static_cast<int>(matrices) + 1};
}

template <Space space, typename T>
void add_accesses(Forms& forms, const std::string& name, const std::string& type) {
  for (const char* vector : {"", ".v2", ".v4"}) {
    forms["ld" + name + vector + "." + type] = load<space, T>();
    if (space != Space::parameters) forms["st" + name + vector + "." + type] = store<space, T>();
  }
}

template <Space space>
void add_space(Forms& forms, const std::string& name) {
  for (const char* type : {"b8", "u8"}) add_accesses<space, uint8_t>(forms, name, type);
  for (const char* type : {"b16", "u16"}) add_accesses<space, uint16_t>(forms, name, type);
  for (const char* type : {"b32", "u32", "f32"}) add_accesses<space, uint32_t>(forms, name, type);
  for (const char* type : {"b64", "u64", "s64", "f64"}) add_accesses<space, uint64_t>(forms, name, type);
  add_accesses<space, int8_t>(forms, name, "s8");
  add_accesses<space, int16_t>(forms, name, "s16");
  add_accesses<space, int32_t>(forms, name, "s32");
}

template <unsigned matrices>
void add_matrices(Forms& forms) {
  const std::string shape = "m8n8.x" + std::to_string(matrices);
  forms["ldmatrix.sync.aligned." + shape + ".shared.b16"] = matrices_8x8<matrices, false, false>();
  forms["ldmatrix.sync.aligned." + shape + ".trans.shared.b16"] = matrices_8x8<matrices, true, false>();
  forms["stmatrix.sync.aligned." + shape + ".shared.b16"] = matrices_8x8<matrices, false, true>();
  forms["stmatrix.sync.aligned." + shape + ".trans.shared.b16"] = matrices_8x8<matrices, true, true>();
}

}  // namespace

void add_memory(Forms& forms) {
  add_space<Space::global>(forms, ".global");
  // Generic addresses are global ones: what would make one of a shared address, cvta.shared, is not known.
  add_space<Space::global>(forms, "");
  add_space<Space::shared>(forms, ".shared"), add_space<Space::shared>(forms, ".shared::cta");
  add_space<Space::parameters>(forms, ".param");
  for (const char* order : {".gpu.relaxed", ".gpu.acq_rel", ""}) {
    const std::string add = ".global" + std::string(order) + ".add.";
    forms["atom" + add + "u64"] = atomic_add<uint64_t, true>(),
                         forms["red" + add + "u64"] = atomic_add<uint64_t, false>();
    forms["atom" + add + "u32"] = atomic_add<uint32_t, true>(),
                         forms["red" + add + "u32"] = atomic_add<uint32_t, false>();
  }
  forms["cp.async.ca.shared.global"] = forms["cp.async.cg.shared.global"] = {Kind::memory, copy_async, -1};
  forms["cp.async.commit_group"] = {Kind::memory,
                                    [](Warp& warp, const Instruction&, uint32_t mask) {
                                      for_lanes(mask, [&](unsigned lane) {
                                        warp.committed[lane].push_back(std::move(warp.uncommitted[lane]));
                                        warp.uncommitted[lane].clear();
                                      });
                                    },
                                    0};
  forms["cp.async.wait_group"] = {
      Kind::memory,
      [](Warp& warp, const Instruction& i, uint32_t mask) { wait_for_copies(warp, mask, warp.read(i.operands[0])[0]); },
      1};
  add_matrices<1>(forms), add_matrices<2>(forms), add_matrices<4>(forms);
}

}  // namespace ptx
