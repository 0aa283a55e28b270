// One source, several instruction sets: kernel files named *_cpu.cpp are compiled once for each, with APC_ISA naming
// the namespace they live in. The set is chosen once, at the first call.
//
// A kernel is a function(params, begin, end) that does the units of work [begin, end).
#pragma once

#include "kernel_cpu.h"

enum class Isa { baseline, x86_64_v3, x86_64_v4 };

// The best set this processor has, or the one that the environment variable APC_KERNELS_ISA names.
Isa isa();

#if defined(__x86_64__)
#define APC_ON_X86(...) __VA_ARGS__
#else
#define APC_ON_X86(...)
#endif

// Declares a kernel: in every set, and outside of them the one to call.
#define APC_DECLARE_IN(SET, FUNCTION, PARAMS)                 \
  namespace SET {                                             \
  void FUNCTION(const PARAMS& p, int64_t begin, int64_t end); \
  }
#define APC_DECLARE_KERNEL(FUNCTION, PARAMS)                                            \
  APC_DECLARE_IN(baseline, FUNCTION, PARAMS)                                            \
  APC_ON_X86(APC_DECLARE_IN(x86_64_v3, FUNCTION, PARAMS))                               \
  APC_ON_X86(APC_DECLARE_IN(x86_64_v4, FUNCTION, PARAMS))                               \
  static inline void FUNCTION(const PARAMS& p, int64_t begin, int64_t end) {            \
    APC_ON_X86(if (isa() == Isa::x86_64_v4) return x86_64_v4::FUNCTION(p, begin, end)); \
    APC_ON_X86(if (isa() == Isa::x86_64_v3) return x86_64_v3::FUNCTION(p, begin, end)); \
    baseline::FUNCTION(p, begin, end);                                                  \
  }

// Defines it in the set at hand: FUNCTION_as<T>, for the dtype that the parameters name.
#define APC_DEFINE_KERNEL(FUNCTION, PARAMS)                                 \
  namespace APC_ISA {                                                       \
  void FUNCTION(const PARAMS& p, int64_t begin, int64_t end) {              \
    switch (p.scalar) {                                                     \
      case Scalar::float32: return FUNCTION##_as<float>(p, begin, end);     \
      case Scalar::float64: return FUNCTION##_as<double>(p, begin, end);    \
      case Scalar::bfloat16: return FUNCTION##_as<BFloat16>(p, begin, end); \
      case Scalar::float16: return FUNCTION##_as<Half>(p, begin, end);      \
    }                                                                       \
  }                                                                         \
  }

// The same for what sees float and double only: the accumulators' types.
#define APC_DEFINE_WIDE_KERNEL(FUNCTION, PARAMS)                                  \
  namespace APC_ISA {                                                             \
  void FUNCTION(const PARAMS& p, int64_t begin, int64_t end) {                    \
    if (p.scalar == Scalar::float64) return FUNCTION##_as<double>(p, begin, end); \
    FUNCTION##_as<float>(p, begin, end);                                          \
  }                                                                               \
  }
