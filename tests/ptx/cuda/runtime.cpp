// A CUDA runtime without a driver: it remembers the names of kernels and their PTX as a program registers them, and
// hands every launch to a Python function. The Python module ptx_cuda: the bindings, and this runtime's two callbacks.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace py = pybind11;

void bind_affinities(py::module_&);
void bind_pyramid_pool(py::module_&);

namespace {

struct Dimensions {
  unsigned x, y, z;
};

struct State {
  std::map<const void*, std::string> names;  // of kernels, by the host function that stands for each
  std::vector<std::string> texts;            // the PTX of each translation unit
  Dimensions grid, block;
  size_t shared_bytes;
  uint32_t seed;
  py::object launch, allocate;
};

State& state() {  // registration happens before main; never destroyed, because Python may be gone by then
  static State* const STATE = new State;
  return *STATE;
}

}  // namespace

void* allocate_memory(size_t bytes) { return reinterpret_cast<void*>(state().allocate(bytes).cast<uintptr_t>()); }
void set_seed(uint32_t seed) { state().seed = seed; }

// The functions that code compiled by nvcc calls, with the types of NVIDIA's headers written out.
extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  struct {
    int magic, version;
    const char* data;
  } image;
  std::memcpy(&image, wrapper, sizeof image);
  uint64_t size;  // behind two numbers of 4 bytes; of what follows the header
  uint16_t header;
  std::memcpy(&size, image.data + 8, sizeof size);
  std::memcpy(&header, image.data + 6, sizeof header);
  const std::string_view all(image.data, header + size);
  const size_t begin = all.find(".version");
  if (begin != std::string_view::npos) state().texts.emplace_back(all.substr(begin, all.find('\0', begin) - begin));
  return static_cast<void**>(wrapper);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  state().names[host] = name;
}

unsigned __cudaPushCallConfiguration(Dimensions grid, Dimensions block, size_t shared_bytes, void*) {
  state().grid = grid, state().block = block, state().shared_bytes = shared_bytes;
  return 0;
}

int __cudaPopCallConfiguration(Dimensions* grid, Dimensions* block, size_t* shared_bytes, void* stream) {
  *grid = state().grid, *block = state().block, *shared_bytes = state().shared_bytes;
  std::memset(stream, 0, sizeof(void*));
  return 0;
}

int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}

int __cudaLaunchKernel(const void* host, Dimensions grid, Dimensions block, void** arguments, size_t shared_bytes,
                       void*) {
  state().launch(state().names.at(host), std::make_tuple(grid.x, grid.y, grid.z), block.x * block.y * block.z,
                 shared_bytes, reinterpret_cast<uintptr_t>(arguments[0]), state().seed);
  return 0;
}

}  // extern "C"

PYBIND11_MODULE(ptx_cuda, module) {
  bind_affinities(module);
  bind_pyramid_pool(module);
  module.def("texts", [] { return state().texts; });
  // launch(kernel, grid, threads, bytes of shared memory, address of the parameters, seed); allocate(bytes) -> address
  module.def("connect", [](py::object launch, py::object allocate) {
    state().launch = std::move(launch), state().allocate = std::move(allocate);
  });
}
