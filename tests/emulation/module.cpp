// The Python module `cuda_emulation`: one function for each emulated operation, and the emulation's own self-tests.
#include "arrays.h"

void bind_adaptive_context(py::module_&);
void bind_affinity_moments(py::module_&);
void bind_pyramid_pool(py::module_&);
void bind_selftest(py::module_&);

PYBIND11_MODULE(cuda_emulation, module) {
  bind_adaptive_context(module);
  bind_affinity_moments(module);
  bind_pyramid_pool(module);
  bind_selftest(module);
}
