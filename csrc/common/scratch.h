// A small array on the heap, freed at the end of the scope. (std::vector's inline functions would be shared between
// the instruction sets that CPU kernels are compiled for.)
#pragma once

#include <cstdint>

namespace {

template <typename T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count) : data(static_cast<T*>(__builtin_malloc(count * sizeof(T) + 1))) {
    if (data == nullptr) __builtin_abort();
  }
  ~Scratch() { __builtin_free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data; }
};

}  // namespace
