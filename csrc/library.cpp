// What the CPU library says of itself. Operators are registered where they are written (common/library.h).
#include "common/library.h"

#include "common/isa.h"

namespace {

std::string instruction_set() { return isa_name(); }

constexpr Operator OPERATORS[] = {{"instruction_set() -> str", TORCH_BOX(&instruction_set)}};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CompositeExplicitAutograd, OPERATORS)
