// A decoded PTX module: kernels of instructions whose operands are numbers of registers or of constants.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr unsigned LANES = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, uint32_t mask);

// plain: one warp's registers. memory: also memory, a place for another warp to go on. The rest is the scheduler's:
// convergent ones wait for all lanes that they name.
enum class Kind : uint8_t { plain, memory, convergent, branch, leave, block_barrier, warp_barrier };

struct Form {
  Kind kind;
  Handler run;
  int operands;                // how many, vectors taken apart; -1 for forms that count themselves
  bool names_members = false;  // the last operand is a mask of the lanes that take part
};

struct Place {
  int line;            // in the PTX
  std::string source;  // file:line, and what it was inlined at
};

struct Instruction {
  const Form* form;
  int opcode;     // index into Kernel::opcodes
  int guard = 0;  // the predicate's register, and whether it is negated
  bool guarded = false, negated = false;
  std::vector<int> operands;  // a register's number; ~number of a constant
  int64_t offset = 0;         // of the first address
  int64_t second_offset = 0;  // of the second one
  uint32_t width = 0;         // bytes of one element in memory, or of a cp.async
  uint32_t count = 1;         // elements of a vector
  uint64_t used_bytes = ~0ull;
  int target = 0;  // where a branch goes
  int place = 0;   // index into Kernel::places
};

struct Parameter {
  uint32_t offset, size;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t static_shared = 0;                                                 // bytes
  uint32_t dynamic_shared() const { return (static_shared + 15) / 16 * 16; }  // where the launch's buffer begins
  int registers = 0;
  std::vector<uint64_t> constants;                   // LANES of each
  std::vector<std::pair<int, std::string>> special;  // registers that are filled before the first instruction
  std::vector<Instruction> code;
  std::vector<std::string> opcodes;
  std::vector<Place> places;
  std::vector<int> lines;    // of each instruction
  int required_threads = 0;  // .reqntid, 0 if the kernel takes any number
};

struct Module {
  Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  std::string target;
  std::vector<std::string> text;  // the PTX line by line, for findings
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
};

class ParseError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

std::unique_ptr<Module> parse(const std::string& text);

// The forms that are known: null for any other.
const Form* find_form(const std::string& opcode);
std::vector<std::string> known_forms();

}  // namespace ptx
