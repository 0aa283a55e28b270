// pyramid_pool's CUDA kernels without a GPU.
#include "../../csrc/pyramid_pool/pyramid_pool_launch.h"
#include "arrays.h"

namespace {

PyramidPoolCuda describe(py::array& map, py::array& pooled, const std::vector<int64_t>& scales) {
  return describe_pyramid_pool(sizes(map).data(), element_strides(map).data(), scales, map.mutable_data(),
                               pooled.mutable_data());
}

void forward(py::array x, const std::string& dtype, const std::vector<int64_t>& scales, py::array out, uint32_t seed) {
  PyramidPoolCuda p = describe(x, out, scales);
  DeviceMemory row_sums(size_t(p.batch) * p.segments * p.chunks * p.columns * p.channels * sizeof(float));
  p.row_sums = static_cast<float*>(row_sums.data());
  with_scalar(dtype, [&](auto scalar) { launch_forward<decltype(scalar)>(p, Launch{seed}); });
}

void backward(py::array grad, const std::string& dtype, const std::vector<int64_t>& scales, py::array grad_x,
              uint32_t seed) {
  const PyramidPoolCuda p = describe(grad_x, grad, scales);
  with_scalar(dtype, [&](auto scalar) { launch_backward<decltype(scalar)>(p, Launch{seed}); });
}

}  // namespace

void bind_pyramid_pool(py::module_& m) {
  m.def("pyramid_pool", forward);
  m.def("pyramid_pool_backward", backward);
}
