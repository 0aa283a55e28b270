// Huge pages under large results. A fresh gradient of 67 MB costs 16,000 page faults, more time than computing it; with
// pages of 2 MB it costs 32. Linux grants them on request where transparent huge pages are set to "madvise", as most
// distributions set them; elsewhere the request changes nothing. (torch's own allocator does the same for every large
// tensor when THP_MEM_ALLOC_ENABLE=1 is set.)
#pragma once

#include <cstdint>

#include "tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

// For memory that is about to be written from end to end: pages that it holds only in part are left alone.
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
