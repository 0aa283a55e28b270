// The Python module `cuda_emulation`: one function for each emulated operation, and the emulation's own self-tests.
#include "arrays.h"

void bind_affinities(py::module_&);
void bind_pyramid_pool(py::module_&);
void bind_selftest(py::module_&);

PYBIND11_MODULE(cuda_emulation, module) {
  bind_affinities(module);
  bind_pyramid_pool(module);
  bind_selftest(module);
}
