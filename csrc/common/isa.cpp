// Chooses the instruction set of the CPU kernels.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
                  __builtin_cpu_supports("movbe") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return isa == Isa::x86_64_v4 ? v4 : isa == Isa::x86_64_v3 ? v3 : true;
#else
  return isa == Isa::baseline;
#endif
}

const char* name(Isa isa) {
#if defined(__x86_64__)
  return isa == Isa::x86_64_v4 ? "x86-64-v4" : isa == Isa::x86_64_v3 ? "x86-64-v3" : "x86-64";
#elif defined(__aarch64__)
  return isa == Isa::baseline ? "neon" : "";
#else
  return isa == Isa::baseline ? "portable" : "";
#endif
}

Isa choose() {
  const char* variable = std::getenv("APC_KERNELS_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  for (Isa isa : {Isa::x86_64_v4, Isa::x86_64_v3, Isa::baseline})
    if (supported(isa) && (wanted.empty() || wanted == name(isa))) return isa;
  throw std::runtime_error(
      "APC_KERNELS_ISA=" + wanted +
      ": this processor allows x86-64, x86-64-v3 and x86-64-v4 as far as it has them, neon on Arm");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return name(isa()); }
