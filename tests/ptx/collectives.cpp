// What the lanes of a warp do together: shuffles, reductions, votes.
#include <algorithm>

#include "forms.h"

namespace ptx {
namespace {

void check_members(Warp& warp, uint32_t mask, uint64_t members) {
  if (mask != (static_cast<uint32_t>(members) & warp.lanes))
    warp.block->machine->report("lanes are missing", warp, static_cast<unsigned>(__builtin_ctz(mask)), 0, "",
                                "not exactly the lanes of the instruction's mask are here");
}

enum class Shuffle { up, down, butterfly, index };

template <Shuffle mode, bool with_predicate>
Form shuffle() {
  return {Kind::convergent,
          [](Warp& warp, const Instruction& instruction, uint32_t mask) {
            const unsigned at = with_predicate ? 2 : 1;
            const uint64_t* values = warp.read(instruction.operands[at]);
            const uint64_t* by = warp.read(instruction.operands[at + 1]);
            const uint64_t* control = warp.read(instruction.operands[at + 2]);
            const uint64_t* members = warp.read(instruction.operands[at + 3]);
            std::array<uint64_t, LANES> result{}, inside{};
            for_lanes(mask, [&](unsigned lane) {
              if ((members[lane] & warp.lanes) != (members[__builtin_ctz(mask)] & warp.lanes))
                check_members(warp, mask, 0);
              const unsigned b = by[lane] & 31, clamp = control[lane] & 31, segment = control[lane] >> 8 & 31;
              const unsigned last = (lane & segment) | (clamp & ~segment), first = lane & segment;
              unsigned from = 0;
              if constexpr (mode == Shuffle::up)
                from = lane - b, inside[lane] = static_cast<int>(lane) - static_cast<int>(b) >= static_cast<int>(last);
              if constexpr (mode == Shuffle::down) from = lane + b, inside[lane] = from <= last;
              if constexpr (mode == Shuffle::butterfly) from = lane ^ b, inside[lane] = from <= last;
              if constexpr (mode == Shuffle::index) from = first | (b & ~segment), inside[lane] = from <= last;
              if (!inside[lane]) from = lane;
              if (!(mask >> from & 1))
                warp.block->machine->report("lanes are missing", warp, lane, 0, "",
                                            "a shuffle reads from a lane that takes no part");
              result[lane] = values[from] & 0xffffffffu;
            });
            check_members(warp, mask, members[__builtin_ctz(mask)]);
            for_lanes(mask, [&](unsigned lane) {
              warp.write(instruction.operands[0])[lane] = result[lane];
              if (with_predicate) warp.write(instruction.operands[1])[lane] = inside[lane];
            });
          },
          with_predicate ? 6 : 5, true};
}

template <typename T, typename Function>
Form reduction(Function) {
  return {Kind::convergent,
          [](Warp& warp, const Instruction& instruction, uint32_t mask) {
            const uint64_t* values = warp.read(instruction.operands[1]);
            check_members(warp, mask, warp.read(instruction.operands[2])[__builtin_ctz(mask)]);
            T result = value_of<T>(values[__builtin_ctz(mask)]);
            for_lanes(mask & (mask - 1),
                      [&](unsigned lane) { result = Function{}(result, value_of<T>(values[lane])); });
            for_lanes(mask, [&](unsigned lane) { warp.write(instruction.operands[0])[lane] = bits_of(result); });
          },
          3, true};
}

void add_shuffles(Forms& forms) {
  forms["shfl.sync.up.b32"] = shuffle<Shuffle::up, false>(), forms["shfl.sync.up.b32|p"] = shuffle<Shuffle::up, true>();
  forms["shfl.sync.down.b32"] = shuffle<Shuffle::down, false>();
  forms["shfl.sync.down.b32|p"] = shuffle<Shuffle::down, true>();
  forms["shfl.sync.bfly.b32"] = shuffle<Shuffle::butterfly, false>();
  forms["shfl.sync.bfly.b32|p"] = shuffle<Shuffle::butterfly, true>();
  forms["shfl.sync.idx.b32"] = shuffle<Shuffle::index, false>();
  forms["shfl.sync.idx.b32|p"] = shuffle<Shuffle::index, true>();
}

template <typename T>
void add_reductions(Forms& forms, const std::string& type) {
  forms["redux.sync.min." + type] = reduction<T>([](T a, T b) { return std::min(a, b); });
  forms["redux.sync.max." + type] = reduction<T>([](T a, T b) { return std::max(a, b); });
  forms["redux.sync.add." + type] =
      reduction<T>([](T a, T b) { return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); });
}

}  // namespace

void add_collectives(Forms& forms) {
  add_shuffles(forms);
  add_reductions<int32_t>(forms, "s32"), add_reductions<uint32_t>(forms, "u32");
  forms["vote.sync.ballot.b32"] = {
      Kind::convergent,
      [](Warp& warp, const Instruction& instruction, uint32_t mask) {
        check_members(warp, mask, warp.read(instruction.operands[2])[__builtin_ctz(mask)]);
        uint32_t ballot = 0;
        for_lanes(mask, [&](unsigned lane) {
          ballot |= static_cast<uint32_t>(warp.read(instruction.operands[1])[lane] & 1) << lane;
        });
        for_lanes(mask, [&](unsigned lane) { warp.write(instruction.operands[0])[lane] = ballot; });
      },
      3, true};
  // The scheduler's own: they touch no register.
  forms["bra"] = forms["bra.uni"] = {Kind::branch, nullptr, 0};
  forms["ret"] = forms["exit"] = {Kind::leave, nullptr, 0};
  forms["bar.sync"] = {Kind::block_barrier, nullptr, 1};
  forms["bar.warp.sync"] = {Kind::warp_barrier, nullptr, 1, true};
}

}  // namespace ptx
