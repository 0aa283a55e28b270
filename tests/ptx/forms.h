// How forms are written down: a function of lanes' values becomes an instruction of a warp.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>

#include "machine.h"
#include "numbers.h"

namespace ptx {

using Forms = std::unordered_map<std::string, Form>;

template <typename Result, typename... Arguments, typename Function, size_t... I>
void map_lanes(Function function, Warp& warp, const Instruction& instruction, uint32_t mask,
               std::index_sequence<I...>) {
  uint64_t* to = warp.write(instruction.operands[0]);
  const uint64_t* from[] = {warp.read(instruction.operands[1 + I])...};
  if (mask == ALL_LANES) {
    for (unsigned lane = 0; lane < LANES; ++lane)
      to[lane] = bits_of<Result>(function(value_of<Arguments>(from[I][lane])...));
  } else {
    for_lanes(mask,
              [&](unsigned lane) { to[lane] = bits_of<Result>(function(value_of<Arguments>(from[I][lane])...)); });
  }
}

// result = function(arguments), lane by lane.
template <typename Result, typename... Arguments, typename Function>
Form lanewise(Function) {
  return {Kind::plain,
          [](Warp& warp, const Instruction& instruction, uint32_t mask) {
            map_lanes<Result, Arguments...>(Function{}, warp, instruction, mask,
                                            std::index_sequence_for<Arguments...>{});
          },
          1 + static_cast<int>(sizeof...(Arguments))};
}

void add_arithmetic(Forms& forms);
void add_conversions(Forms& forms);
void add_memory(Forms& forms);
void add_collectives(Forms& forms);
void add_products(Forms& forms);

}  // namespace ptx
