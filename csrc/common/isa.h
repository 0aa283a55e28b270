// One source, several instruction sets: kernel files named *_cpu.cpp are compiled once for each, with APC_ISA naming
// the namespace they live in. The set is chosen once, at the first call.
#pragma once

#if defined(__x86_64__)
#define APC_FOR_EACH_ISA(DO) DO(baseline) DO(x86_64_v3) DO(x86_64_v4)
#else
#define APC_FOR_EACH_ISA(DO) DO(baseline)
#endif

enum class Isa { baseline, x86_64_v3, x86_64_v4 };

// The best set this processor has, or the one that the environment variable APC_KERNELS_ISA names.
Isa isa();
const char* isa_name();

#if defined(__x86_64__)
#define APC_DISPATCH_ISA(function, ...)                         \
  (isa() == Isa::x86_64_v4   ? x86_64_v4::function(__VA_ARGS__) \
   : isa() == Isa::x86_64_v3 ? x86_64_v3::function(__VA_ARGS__) \
                             : baseline::function(__VA_ARGS__))
#else
#define APC_DISPATCH_ISA(function, ...) baseline::function(__VA_ARGS__)
#endif
