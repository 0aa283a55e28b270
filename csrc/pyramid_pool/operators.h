// pyramid_pool's operators, as the two libraries register them, and the check they share.
#pragma once

#include "../common/bins.h"
#include "../common/tensor.h"

// Each writes into the tensor it is given last.
void pyramid_pool(const Tensor& x, const std::vector<int64_t>& scales, const Tensor& out);
void pyramid_pool_backward(const Tensor& grad, const std::vector<int64_t>& scales, const Tensor& grad_x);
void pyramid_pool_cuda(const Tensor& x, const std::vector<int64_t>& scales, const Tensor& out);
void pyramid_pool_backward_cuda(const Tensor& grad, const std::vector<int64_t>& scales, const Tensor& grad_x);

// map: x or its gradient; pooled: the result or its gradient.
inline void check_pyramid_pool(const Tensor& map, const Tensor& pooled, const std::vector<int64_t>& scales) {
  STD_TORCH_CHECK(map.dim() == 4, "map: expected 4 dimensions, got ", map.dim());
  for (int i : {2, 3})
    STD_TORCH_CHECK(map.size(i) > 0 && map.size(i) < MAX_SIZE, "map: expected a height and width of 1 to ",
                    MAX_SIZE - 1, ", got ", map.size(i));
  STD_TORCH_CHECK(map.stride(3) == 1 || map.size(3) == 1 || map.stride(1) == 1 || map.size(1) == 1,
                  "map: expected columns or channels to lie side by side in memory");
  STD_TORCH_CHECK(!scales.empty() && scales.size() <= MAX_SCALES, "scales: expected 1 to ", MAX_SCALES, " scales");
  int64_t regions = 0;
  for (int64_t s : scales) {
    STD_TORCH_CHECK(s >= 1 && s <= MAX_SCALE, "scales: expected scales of 1 to ", MAX_SCALE, ", got ", s);
    regions += s * s;
  }
  check_shape(pooled, "pooled", {map.size(0), map.size(1), regions});
  check_like(pooled, "pooled", map, "map");
  STD_TORCH_CHECK(pooled.is_contiguous(), "pooled: expected a contiguous tensor");
}
