// What every CUDA launch needs: the right device, torch's current stream, a dtype turned into a type.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "device.cuh"
#include "operator.h"

// Makes a tensor's device the current one for the scope; called like a function, launches a kernel on torch's stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  template <typename Params>
  void operator()(void (*kernel)(Params), int grid_x, int grid_y, int threads, int shared_bytes,
                  const Params& p) const {
    constexpr int GRANTED = 48 * 1024;  // what every kernel may have without asking
    if (shared_bytes > GRANTED)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    kernel<<<dim3(unsigned(grid_x), unsigned(grid_y)), unsigned(threads), size_t(shared_bytes), stream_>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// function(a number of the tensor's dtype)
template <typename Function>
void with_scalar(const Tensor& tensor, const char* name, Function function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return function(float{});
    case ScalarType::BFloat16: return function(BFloat16{});
    case ScalarType::Half: return function(Half{});
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}
