// What every operator on the GPU needs of torch: the right device, the current stream, a map's dtype.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "launch.h"
#include "operator.h"

// Makes a tensor's device the current one for the scope; launches on torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    launcher_ = {static_cast<cudaStream_t>(stream), [](cudaError_t error) { STD_CUDA_CHECK(error); }};
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const Launcher& launcher() const { return launcher_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Launcher launcher_;
};

inline MapType map_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return MapType::float32;
    case ScalarType::BFloat16: return MapType::bfloat16;
    case ScalarType::Half: return MapType::float16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}
