// pyramid_pool's operators on the CPU: check, describe the work, share it out among torch's threads.
#include "pyramid_pool.h"

#include <algorithm>
#include <memory>

#include "../common/pages.h"
#include "../common/scalar_of.h"
#include "../common/segments.h"
#include "operators.h"

namespace {

// The description together with what it points to.
struct Work {
  Segments rows, cols;
  PyramidPool pool;

  Work(const Tensor& map, const Tensor& pooled, const std::vector<int64_t>& scales)
      : rows(map.size(2), scales), cols(map.size(3), scales), pool{} {
    isa();  // a wrong APC_KERNELS_ISA is reported from here, not from inside a thread
    int64_t columns = 0, regions = 0;
    for (int64_t s : scales) columns += s, regions += s * s;
    pool.scalar = scalar_of(map, "map");
    pool.batch = map.size(0), pool.channels = map.size(1), pool.height = map.size(2), pool.width = map.size(3);
    pool.stride_b = map.stride(0), pool.stride_c = map.stride(1);
    pool.stride_y = map.stride(2), pool.stride_x = map.stride(3);
    pool.num_scales = static_cast<int>(scales.size()), pool.scales = scales.data();
    pool.columns = static_cast<int>(columns), pool.regions = regions;
    pool.rows = rows.view(), pool.cols = cols.view();
    pool.map = map.data_ptr(), pool.pooled = pooled.data_ptr();
  }

  // Whether neighbouring columns (NCHW) rather than neighbouring channels (NHWC) lie side by side in memory.
  bool by_plane() const { return pool.width == 1 ? pool.stride_c != 1 : pool.stride_x == 1; }
  int64_t runs() const { return (pool.channels + CHANNEL_RUN - 1) / CHANNEL_RUN; }
};

// Enough elements of a map for a thread to be worth waking.
constexpr int64_t GRAIN = 32768;
int64_t grain(int64_t elements) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements)); }

}  // namespace

void pyramid_pool(const Tensor& x, const std::vector<int64_t>& scales, const Tensor& out) {
  check_pyramid_pool(x, out, scales);
  Work work(x, out, scales);
  PyramidPool& p = work.pool;
  if (work.by_plane()) {
    torch::stable::parallel_for(0, p.batch * p.channels, grain(p.height * p.width),
                                [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(pool_planes, p, begin, end); });
    return;
  }
  const size_t accumulator = p.scalar == Scalar::float64 ? sizeof(double) : sizeof(float);
  const std::unique_ptr<char[]> row_sums(new char[accumulator * p.batch * p.rows.count * p.columns * p.channels]);
  p.row_sums = row_sums.get();
  const int64_t row_units = p.batch * p.rows.count * work.runs(), area = p.height * p.width / p.rows.count;
  torch::stable::parallel_for(0, row_units, grain(CHANNEL_RUN * area),
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(pool_rows, p, begin, end); });
  torch::stable::parallel_for(0, p.batch * work.runs(), 1,
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(pool_row_bins, p, begin, end); });
}

void pyramid_pool_backward(const Tensor& grad, const std::vector<int64_t>& scales, const Tensor& grad_x) {
  check_pyramid_pool(grad_x, grad, scales);
  Work work(grad_x, grad, scales);
  const PyramidPool& p = work.pool;
  request_huge_pages(p.map, grad_x.numel() * grad_x.element_size());
  if (work.by_plane()) {
    torch::stable::parallel_for(0, p.batch * p.channels, grain(p.height * p.width),
                                [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(spread_planes, p, begin, end); });
    return;
  }
  const int64_t row_units = p.batch * p.rows.count * work.runs(), area = p.height * p.width / p.rows.count;
  torch::stable::parallel_for(0, row_units, grain(CHANNEL_RUN * area),
                              [&](int64_t begin, int64_t end) { APC_DISPATCH_ISA(spread_rows, p, begin, end); });
}
