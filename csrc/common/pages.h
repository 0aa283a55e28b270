// Huge pages under large results. A fresh gradient of 67 MB costs 16,000 page faults, more time than computing it; with
// pages of 2 MB it costs 32. Linux grants them on request where transparent huge pages are set to "madvise", as most
// distributions set them; elsewhere the request changes nothing. (torch's own allocator does the same for every large
// tensor when THP_MEM_ALLOC_ENABLE=1 is set.)
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

// For memory that is about to be written from end to end: pages that it holds only in part are left alone.
inline void request_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t HUGE_PAGE = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}
