// How raw operators are registered: the schema of each stands beside what runs it, in one list for both libraries.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>

struct Operator {
  const char* schema;
  void (*run)(StableIValue*, uint64_t, uint64_t);  // TORCH_BOX(&function)

  std::string name() const { return std::string(schema, std::strcspn(schema, "(")); }
};

#define APC_REGISTER(NAMESPACE, DEVICE, OPERATORS)                                      \
  STABLE_TORCH_LIBRARY_FRAGMENT(NAMESPACE, library) {                                   \
    for (const Operator& each : OPERATORS) library.def(each.schema);                    \
  }                                                                                     \
  STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, DEVICE, library) {                               \
    for (const Operator& each : OPERATORS) library.impl(each.name().c_str(), each.run); \
  }
