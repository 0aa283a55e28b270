// pyramid_pool's operators on the CPU: the work described to the kernels, and shared out among torch's threads.
#include "pyramid_pool.h"

#include <memory>

#include "../common/run.h"
#include "operators.h"
#include "segments.h"

namespace {

// The description together with what it points to.
struct Work {
  Segments rows, cols;
  PyramidPool pool;

  Work(const Tensor& map, const Tensor& pooled, const Scales& scales)
      : rows(map.size(2), scales), cols(map.size(3), scales), pool{} {
    pool.scalar = scalar_of(map, "map");
    pool.batch = map.size(0), pool.channels = map.size(1);
    pool.num_scales = static_cast<int>(scales.size()), pool.scales = scales.data();
    for (int64_t s : scales) pool.columns += static_cast<int>(s), pool.regions += s * s;
    pool.rows = rows.view(), pool.cols = cols.view();
    pool.map = map_of(map), pool.pooled = pooled.data_ptr();
  }
};

// Whether neighbouring columns (NCHW) rather than neighbouring channels (NHWC) lie side by side in memory.
bool by_plane(const Map& map) { return map.width == 1 ? map.stride_c != 1 : map.stride_x == 1; }
int64_t runs(const PyramidPool& p) { return (p.channels + CHANNEL_RUN - 1) / CHANNEL_RUN; }

using Kernel = void (*)(const PyramidPool&, int64_t, int64_t);

void run_planes(Kernel kernel, const PyramidPool& p) {
  run(kernel, p, p.batch * p.channels, grain_of(p.map.height * p.map.width));
}

void run_rows(Kernel kernel, const PyramidPool& p) {
  const int64_t area = p.map.height * p.map.width / p.rows.count;
  run(kernel, p, p.batch * p.rows.count * runs(p), grain_of(CHANNEL_RUN * area));
}

struct Cpu {
  static void pool(const Tensor& x, const Scales& scales, const Tensor& out) {
    Work work(x, out, scales);
    PyramidPool& p = work.pool;
    if (by_plane(p.map)) return run_planes(pool_planes, p);
    const size_t accumulator = p.scalar == Scalar::float64 ? sizeof(double) : sizeof(float);
    const std::unique_ptr<char[]> row_sums(new char[accumulator * p.batch * p.rows.count * p.columns * p.channels]);
    p.row_sums = row_sums.get();
    run_rows(pool_rows, p);
    run(pool_row_bins, p, p.batch * runs(p));
  }

  static void spread(const Tensor& grad, const Scales& scales, const Tensor& grad_x) {
    const Work work(grad_x, grad, scales);
    request_huge_pages(grad_x);
    if (by_plane(work.pool.map)) return run_planes(spread_planes, work.pool);
    run_rows(spread_rows, work.pool);
  }
};

}  // namespace

APC_REGISTER(apc_kernels_cpp, CPU, PYRAMID_POOL_OPERATORS<Cpu>)
