// Chooses the instruction set of the CPU kernels, and says which it is.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "operator.h"

namespace {

struct Set {
  Isa isa;
  const char* name;
  bool supported;
};

// Those there are code for, best first.
std::vector<Set> sets() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
                  __builtin_cpu_supports("movbe") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return {{Isa::x86_64_v4, "x86-64-v4", v4}, {Isa::x86_64_v3, "x86-64-v3", v3}, {Isa::baseline, "x86-64", true}};
#elif defined(__aarch64__)
  return {{Isa::baseline, "neon", true}};
#else
  return {{Isa::baseline, "portable", true}};
#endif
}

Set choose() {
  const char* variable = std::getenv("APC_KERNELS_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  for (const Set& set : sets())
    if (set.supported && (wanted.empty() || wanted == set.name)) return set;
  throw std::runtime_error(
      "APC_KERNELS_ISA=" + wanted +
      ": this processor allows x86-64, x86-64-v3 and x86-64-v4 as far as it has them, neon on Arm");
}

const Set& chosen() {
  static const Set set = choose();
  return set;
}

std::string instruction_set() { return chosen().name; }

constexpr Operator OPERATORS[] = {{"instruction_set() -> str", TORCH_BOX(&instruction_set)}};

}  // namespace

Isa isa() { return chosen().isa; }

APC_REGISTER(apc_kernels_cpp, CompositeExplicitAutograd, OPERATORS)
