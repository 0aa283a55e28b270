// pyramid_pool's operators, written once for both libraries: their schemas, and what they ask of their arguments. Each
// writes into the tensor it is given last. A Device (pyramid_pool.cpp, pyramid_pool.cu) runs the kernels.
#pragma once

#include "../common/operator.h"
#include "bins.h"

// map: x or its gradient; pooled: the result or its gradient.
inline void check_pyramid_pool(const Tensor& map, const Tensor& pooled, const Scales& scales) {
  check_dimensions(map, "map", 4);
  for (int i : {2, 3})
    STD_TORCH_CHECK(map.size(i) > 0 && map.size(i) < MAX_SIZE, "map: expected a height and width of 1 to ",
                    MAX_SIZE - 1, ", got ", map.size(i));
  check_layout(map, "map");
  STD_TORCH_CHECK(!scales.empty() && scales.size() <= MAX_SCALES, "scales: expected 1 to ", MAX_SCALES, " scales");
  int64_t regions = 0;
  for (int64_t s : scales) {
    STD_TORCH_CHECK(s >= 1 && s <= MAX_SCALE, "scales: expected scales of 1 to ", MAX_SCALE, ", got ", s);
    regions += s * s;
  }
  check_beside(pooled, "pooled", map, "map", {map.size(0), map.size(1), regions});
}

template <typename Device>
void pyramid_pool(const Tensor& x, const Scales& scales, const Tensor& out) {
  check_pyramid_pool(x, out, scales);
  Device::pool(x, scales, out);
}

template <typename Device>
void pyramid_pool_backward(const Tensor& grad, const Scales& scales, const Tensor& grad_x) {
  check_pyramid_pool(grad_x, grad, scales);
  Device::spread(grad, scales, grad_x);
}

template <typename Device>
constexpr Operator PYRAMID_POOL_OPERATORS[] = {
    {"pyramid_pool(Tensor x, int[] scales, Tensor(a!) out) -> ()", TORCH_BOX(&pyramid_pool<Device>)},
    {"pyramid_pool_backward(Tensor grad, int[] scales, Tensor(a!) grad_x) -> ()",
     TORCH_BOX(&pyramid_pool_backward<Device>)},
};
