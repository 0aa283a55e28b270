// What running a CPU kernel takes: tensors as the kernels see them, huge pages under large results, units of work
// shared out among torch's threads.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>

#include "isa.h"
#include "operator.h"

inline Scalar scalar_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Scalar::float32;
    case ScalarType::Double: return Scalar::float64;
    case ScalarType::BFloat16: return Scalar::bfloat16;
    case ScalarType::Half: return Scalar::float16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

inline Map map_of(const Tensor& map) {
  return {map.data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.stride(3), map.size(2), map.size(3)};
}

// A fresh gradient of 67 MB costs 16,000 page faults, more time than computing it; with pages of 2 MB it costs 32.
// Linux grants them on request where transparent huge pages are set to "madvise", as most distributions set them;
// elsewhere the request changes nothing. (torch's own allocator does the same for every large tensor when
// THP_MEM_ALLOC_ENABLE=1 is set.) For memory that is about to be written from end to end: pages that it holds only in
// part are left alone.
inline void request_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t HUGE_PAGE = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t begin = (first + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (first + tensor.numel() * tensor.element_size()) / HUGE_PAGE * HUGE_PAGE;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

// Units of this many elements each: as many as make it worth waking a thread.
inline int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements)); }

// kernel(p, begin, end) for all `units`, `grain` of them at a time at least.
template <typename Params>
void run(void (*kernel)(const Params&, int64_t, int64_t), const Params& p, int64_t units, int64_t grain = 1) {
  isa();  // a wrong APC_KERNELS_ISA is reported from here, not from inside a thread
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}
