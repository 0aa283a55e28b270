// pyramid_conv's CPU kernels, compiled once for each instruction set. Bytes: forward reads the weight once and writes
// the result once; backward reads the result's gradient once, the weight once, and writes the weight's gradient once.
#include "../common/regions_cpu.h"
#include "pyramid_conv.h"

namespace {

constexpr int64_t ROWS_AT_ONCE = 14;  // of a plane, before they are stored to a map whose channels lie side by side

// Numbers that a unit's products take for one output channel: all scales', their columns padded.
inline int64_t products_of(const PyramidConv& p) {
  const PyramidScale last = pyramid_scale(p, p.num_scales - 1);
  return p.kernel * p.kernel * (last.padded_before + padded(last.columns));
}

inline int64_t largest_side(const PyramidConv& p) {
  int64_t largest = 0;
  for (int64_t i = 0; i < p.num_scales; ++i) largest = p.scales[i] > largest ? p.scales[i] : largest;
  return largest * p.kernel;
}

// The taps of regions along an axis, (s, k): those of the scales before this one.
inline int64_t first_tap(const PyramidConv& p, int64_t scale) {
  int64_t first = 0;
  for (int64_t i = 0; i < scale; ++i) first += p.scales[i] * p.kernel;
  return first;
}

// Calls visit(place among the products' numbers, place in the (s·k, s·k) grid) for the regions of an image at a scale.
template <typename Visit>
inline void each_tap(const PyramidConv& p, const PyramidScale& scale, int64_t row, int64_t image, int64_t grid_row,
                     Visit visit) {
  const int64_t k = p.kernel, s = scale.side;
  for (int64_t ty = 0; ty < k; ++ty)
    for (int64_t tx = 0; tx < k; ++tx) {
      const int64_t from = (ty * k + tx) * row + image * scale.regions;
      for (int64_t ry = 0; ry < s; ++ry)
        for (int64_t rx = 0; rx < s; ++rx) visit(from + ry * s + rx, (ry * k + ty) * grid_row + rx * k + tx);
    }
}

// The products of an output channel with the regions of all scales and images.
template <typename T>
void products_of_output(const PyramidConv& p, int64_t output, T* products) {
  const int64_t taps = p.kernel * p.kernel;
  for (int64_t i = 0; i < p.num_scales; ++i) {
    const PyramidScale scale = pyramid_scale(p, i);
    const T* const weight = as<T>(p.weight) + output * p.weight_o + i * p.channels * p.weight_c;
    const T* const right = as<T>(p.by_column) + scale.padded_before * p.channels;
    const int64_t columns = padded(scale.columns), panel = p.channels * PANEL;
    T* const out = products + taps * scale.padded_before;
    if (p.weight_c == 1)
      multiply<T, false>(taps, columns, p.channels, weight, p.weight_t, right, panel, PANEL, out, columns);
    else
      multiply<T, true>(taps, columns, p.channels, weight, p.weight_c, right, panel, PANEL, out, columns);
  }
}

// The rows of an image's plane before they are interpolated along the height, (taps, padded w).
template <typename T>
void rows_of_plane(const PyramidConv& p, const T* products, int64_t image, T* grid, T* rows) {
  const int64_t width = padded(p.map.width);
  for (int64_t i = 0; i < p.num_scales; ++i) {
    const PyramidScale scale = pyramid_scale(p, i);
    const int64_t side = scale.side * p.kernel, first = first_tap(p, i);
    const T* const from = products + p.kernel * p.kernel * scale.padded_before;
    each_tap(p, scale, padded(scale.columns), image, side, [&](int64_t n, int64_t at) { grid[at] = from[n]; });
    multiply<T, false>(side, width, side, grid, side, as<T>(p.of_columns) + first * width, PANEL, width,
                       rows + first * width, width);
  }
}

template <typename T>
void pyramid_conv_as(const PyramidConv& p, int64_t begin, int64_t end) {
  const int64_t at_once = outputs_at_once(p), width = padded(p.map.width), size = products_of(p);
  const int64_t side = largest_side(p);
  Scratch<T> products(at_once * size), grid(side * side), rows(at_once * p.taps * width);
  Scratch<T> tile(at_once > 1 ? at_once * ROWS_AT_ONCE * width : 0);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * at_once, count = p.outputs - first < at_once ? p.outputs - first : at_once;
    for (int64_t o = 0; o < count; ++o) products_of_output<T>(p, first + o, products + o * size);
    for (int64_t b = 0; b < p.batch; ++b) {
      T* const map = as<T>(p.map.data) + b * p.map.stride_b + first * p.map.stride_c;
      for (int64_t o = 0; o < count; ++o) rows_of_plane<T>(p, products + o * size, b, grid, rows + o * p.taps * width);
      if (at_once == 1) {
        multiply<T, false>(p.map.height, p.map.width, p.taps, as<T>(p.of_rows), p.taps, rows, PANEL, width, map,
                           p.map.stride_y);
        continue;
      }
      for (int64_t y = 0; y < p.map.height; y += ROWS_AT_ONCE) {
        const int64_t some = p.map.height - y < ROWS_AT_ONCE ? p.map.height - y : ROWS_AT_ONCE;
        for (int64_t o = 0; o < count; ++o)
          multiply<T, false>(some, width, p.taps, as<T>(p.of_rows) + y * p.taps, p.taps, rows + o * p.taps * width,
                             PANEL, width, tile + o * ROWS_AT_ONCE * width, width);
        for (int64_t i = 0; i < some; ++i)
          for (int64_t x = 0; x < p.map.width; ++x)
            for (int64_t o = 0; o < count; ++o)
              map[(y + i) * p.map.stride_y + x * p.map.stride_x + o] = tile[(o * ROWS_AT_ONCE + i) * width + x];
      }
    }
  }
}

// The planes of some output channels of an image, (count, h, padded w); zeros follow the last column.
template <typename T>
void load_planes(const PyramidConv& p, int64_t image, int64_t first, int64_t count, T* planes) {
  const int64_t width = padded(p.map.width);
  const T* const map = as<T>(p.map.data) + image * p.map.stride_b + first * p.map.stride_c;
  for (int64_t y = 0; y < p.map.height; ++y) {
    const T* const from = map + y * p.map.stride_y;
    for (int64_t o = 0; o < count; ++o) {
      T* const to = planes + (o * p.map.height + y) * width;
      for (int64_t x = p.map.width; x < width; ++x) to[x] = T(0);
      if (p.map.stride_x == 1) std::memcpy(to, from + o * p.map.stride_c, p.map.width * sizeof(T));
    }
    for (int64_t x = 0; x < p.map.width && p.map.stride_x != 1; ++x)
      for (int64_t o = 0; o < count; ++o)
        planes[(o * p.map.height + y) * width + x] = from[o * p.map.stride_c + x * p.map.stride_x];
  }
}

// The gradients of an output channel's products with the regions of an image, from its plane's gradient.
template <typename T>
void product_gradients(const PyramidConv& p, int64_t output, int64_t image, const T* plane, T* rows, T* grid) {
  const int64_t width = padded(p.map.width), taps = p.kernel * p.kernel;
  multiply<T, true>(p.taps, width, p.map.height, as<T>(p.of_rows), p.taps, plane, PANEL, width, rows, width);
  const T* right = as<T>(p.column_panels);
  for (int64_t i = 0; i < p.num_scales; ++i) {
    const PyramidScale scale = pyramid_scale(p, i);
    const int64_t side = scale.side * p.kernel, grid_row = padded(side);
    multiply<T, false>(side, grid_row, p.map.width, rows + first_tap(p, i) * width, width, right, p.map.width * PANEL,
                       PANEL, grid, grid_row);
    right += p.map.width * grid_row;
    T* const to = as<T>(p.products) + taps * (p.outputs * scale.columns_before + output * scale.columns);
    each_tap(p, scale, scale.columns, image, grid_row, [&](int64_t n, int64_t at) { to[n] = grid[at]; });
  }
}

// The gradient of an output channel's weights.
template <typename T>
void weight_gradient(const PyramidConv& p, int64_t output, T* sums) {
  const int64_t taps = p.kernel * p.kernel, channels = padded(p.channels);
  for (int64_t i = 0; i < p.num_scales; ++i) {
    const PyramidScale scale = pyramid_scale(p, i);
    const T* const left = as<T>(p.products) + taps * (p.outputs * scale.columns_before + output * scale.columns);
    multiply<T, false>(taps, channels, scale.columns, left, scale.columns,
                       as<T>(p.by_channel) + scale.columns_before * channels, scale.columns * PANEL, PANEL, sums,
                       channels);
    T* const to = as<T>(p.grad_weight) + output * p.grad_weight_o + i * p.channels * taps;
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t t = 0; t < taps; ++t) to[c * taps + t] = sums[t * channels + c];
  }
}

template <typename T>
void pyramid_conv_weight_gradients_as(const PyramidConv& p, int64_t begin, int64_t end) {
  const int64_t at_once = outputs_at_once(p), width = padded(p.map.width), side = largest_side(p);
  Scratch<T> planes(at_once * p.map.height * width), rows(p.taps * width), grid(side * padded(side));
  Scratch<T> sums(p.grad_weight == nullptr ? 0 : p.kernel * p.kernel * padded(p.channels));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * at_once, count = p.outputs - first < at_once ? p.outputs - first : at_once;
    for (int64_t b = 0; b < p.batch; ++b) {
      load_planes<T>(p, b, first, count, planes);
      for (int64_t o = 0; o < count; ++o)
        product_gradients<T>(p, first + o, b, planes + o * p.map.height * width, rows, grid);
    }
    for (int64_t o = 0; o < count && p.grad_weight != nullptr; ++o) weight_gradient<T>(p, first + o, sums);
  }
}

template <typename T>
void pyramid_conv_region_gradients_as(const PyramidConv& p, int64_t begin, int64_t end) {
  const int64_t taps = p.kernel * p.kernel, outputs = taps < 256 ? 256 / taps : 1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t index = unit % p.num_scales, first = unit / p.num_scales * PANEL;
    const PyramidScale scale = pyramid_scale(p, index);
    const int64_t count = p.channels - first < PANEL ? p.channels - first : PANEL;
    const T* const weight = as<T>(p.weight) + (index * p.channels + first) * p.weight_c;
    const T* const grads = as<T>(p.products) + taps * p.outputs * scale.columns_before;
    region_gradient<T>(p, scale, first, taps * p.outputs, taps * outputs, grads, as<T>(p.grad_regions),
                       [&](int64_t k, int64_t some, T* to) {
                         if (count < PANEL) std::memset(to, 0, some * PANEL * sizeof(T));
                         for (int64_t o = 0; o < some / taps; ++o)
                           for (int64_t i = 0; i < count; ++i)
                             for (int64_t t = 0; t < taps; ++t)
                               to[(o * taps + t) * PANEL + i] =
                                   weight[(k / taps + o) * p.weight_o + i * p.weight_c + t * p.weight_t];
                       });
  }
}

template <typename T>
void pyramid_conv_pack_as(const PyramidConv& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) pack_regions<T>(p, unit);
}

}  // namespace

APC_DEFINE_WIDE_KERNEL(pyramid_conv_pack, PyramidConv)
APC_DEFINE_WIDE_KERNEL(pyramid_conv, PyramidConv)
APC_DEFINE_WIDE_KERNEL(pyramid_conv_weight_gradients, PyramidConv)
APC_DEFINE_WIDE_KERNEL(pyramid_conv_region_gradients, PyramidConv)
