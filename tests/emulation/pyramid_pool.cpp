// pyramid_pool's CUDA kernels without a GPU: numpy arrays into parameters.
#include "../../csrc/pyramid_pool/pyramid_pool_cuda.h"
#include "arrays.h"
#include "launches.h"

namespace {

PyramidPoolCuda describe(py::array& map, py::array& pooled, const std::vector<int64_t>& scales) {
  return describe_pyramid_pool(sizes(map).data(), element_strides(map).data(), scales, map.mutable_data(),
                               pooled.mutable_data());
}

void forward(py::array x, const std::string& dtype, const std::vector<int64_t>& scales, py::array out, uint32_t seed) {
  PyramidPoolCuda p = describe(x, out, scales);
  run_pyramid_pool(p, dtype, seed);
}

void backward(py::array grad, const std::string& dtype, const std::vector<int64_t>& scales, py::array grad_x,
              uint32_t seed) {
  PyramidPoolCuda p = describe(grad_x, grad, scales);
  run_pyramid_pool_backward(p, dtype, seed);
}

}  // namespace

void bind_pyramid_pool(py::module_& m) {
  m.def("pyramid_pool", forward);
  m.def("pyramid_pool_backward", backward);
}
