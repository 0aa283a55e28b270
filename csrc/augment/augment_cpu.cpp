// augment's CPU kernel, compiled once for each instruction set: loops along a row of the window, which vectorise.
//
// Integers throughout, but for products and quotients that are cut off or rounded to integers. No product is added to
// anything but 0 or multiplied by anything but 1 before that: whether a compiler fuses it with the sum makes no
// difference, and every instruction set gives the same bits.
#include "augment.h"

namespace {

constexpr int CHANNELS = 3;
constexpr int64_t WORD = sizeof(uint32_t);

// In 256ths; 0 where there is no next element.
uint32_t weight_of_next(const Axis& axis, const Position& position) {
  if (position.next == position.index) return 0;
  return static_cast<uint32_t>((256 * position.rest + axis.size) / axis.denominator);
}

// The columns of a window: which pixels of a row they need, where among these each begins, the weight of the one after.
struct Columns {
  int64_t first, pixels, count;
  Scratch<int> begins;
  Scratch<uint32_t> weights;

  explicit Columns(const Augment& p)
      : first(p.columns.at(p.left).index),
        pixels(p.columns.at(p.left + p.width - 1).next + 1 - first),
        count(p.width),
        begins(count),
        weights(count) {
    for (int64_t x = 0; x < count; ++x) {
      const Position position = p.columns.at(p.left + (p.flip ? count - 1 - x : x));
      begins[x] = static_cast<int>(CHANNELS * (position.index - first));
      weights[x] = weight_of_next(p.columns, position);
    }
  }
};

void interleave(const uint8_t* __restrict red, const uint8_t* __restrict green, const uint8_t* __restrict blue,
                int64_t step, int64_t count, uint8_t* __restrict to) {
  for (int64_t x = 0; x < count; ++x) {
    to[CHANNELS * x] = red[x * step];
    to[CHANNELS * x + 1] = green[x * step];
    to[CHANNELS * x + 2] = blue[x * step];
  }
}

// Of a row of the image, channels side by side.
void read_pixels(const Augment& p, int64_t row, const Columns& columns, uint8_t* to) {
  const uint8_t* const red = p.image + row * p.stride_y + columns.first * p.stride_x;
  const uint8_t *const green = red + p.stride_c, *const blue = green + p.stride_c;
  if (p.stride_c == 1 && p.stride_x == CHANNELS)
    __builtin_memcpy(to, red, CHANNELS * columns.pixels);
  else if (p.stride_x == 1)
    interleave(red, green, blue, 1, columns.pixels, to);  // with a constant the loop vectorises
  else
    interleave(red, green, blue, p.stride_x, columns.pixels, to);
}

// Red, green, blue from the lowest byte on, and above them whatever comes next.
uint32_t pixel_at(const uint8_t* from) {
  uint32_t pixel;
  __builtin_memcpy(&pixel, from, WORD);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  pixel = __builtin_bswap32(pixel);
#endif
  return pixel;
}

uint32_t between(uint32_t first, uint32_t second, uint32_t weight) { return 256 * first + (second - first) * weight; }

// A row of the image, resized along itself: levels in 16 bits, 8 of them binary places. Red and blue share a word, of
// which each keeps to its half in all that is done to them.
struct Line {
  int64_t row = -1;
  Scratch<uint32_t> red_blue, green;
  explicit Line(int64_t width) : red_blue(width), green(width) {}
};

void gather(const uint8_t* pixels, const int* begins, int64_t count, uint32_t* __restrict own,
            uint32_t* __restrict next) {
  for (int64_t x = 0; x < count; ++x) {
    own[x] = pixel_at(pixels + begins[x]);
    next[x] = pixel_at(pixels + begins[x] + CHANNELS);
  }
}

void between_pixels(const uint32_t* __restrict own, const uint32_t* __restrict next, const uint32_t* __restrict weights,
                    int64_t count, uint32_t* __restrict red_blue, uint32_t* __restrict green) {
  constexpr uint32_t RED_BLUE = 0xff00ff, LOWEST = 0xff;
  for (int64_t x = 0; x < count; ++x) {
    red_blue[x] = between(own[x] & RED_BLUE, next[x] & RED_BLUE, weights[x]);
    green[x] = between(own[x] >> 8 & LOWEST, next[x] >> 8 & LOWEST, weights[x]);
  }
}

void between_lines(const uint32_t* __restrict red_blue, const uint32_t* __restrict green,
                   const uint32_t* __restrict red_blue_below, const uint32_t* __restrict green_below, uint32_t weight,
                   int64_t count, uint8_t* __restrict reds, uint8_t* __restrict greens, uint8_t* __restrict blues) {
  constexpr uint32_t LOWER = 0xffff, HALF = 1 << 15;
  for (int64_t x = 0; x < count; ++x) {
    reds[x] = (between(red_blue[x] & LOWER, red_blue_below[x] & LOWER, weight) + HALF) >> 16;
    greens[x] = (between(green[x], green_below[x], weight) + HALF) >> 16;
    blues[x] = (between(red_blue[x] >> 16, red_blue_below[x] >> 16, weight) + HALF) >> 16;
  }
}

// One of the two changes nothing.
void multiply_add(uint8_t* __restrict levels, int64_t count, float factor, float summand) {
  for (int64_t x = 0; x < count; ++x) {
    float level = static_cast<float>(levels[x]) * factor + summand;
    level = level < 0 ? 0 : level;
    levels[x] = static_cast<uint8_t>(static_cast<int>(level > 255 ? 255 : level));
  }
}

// number * 4096 / level, rounded, for a number below 256; beside level 0 stands some number.
int ratio(int number, int level) {
  constexpr float ANCHOR = 0x1.8p23f;  // in its sum with a quotient the last bit counts ones
  const float anchored = static_cast<float>(number * 4096) / static_cast<float>(level > 1 ? level : 1) + ANCHOR;
  int bits, bits_of_anchor;
  __builtin_memcpy(&bits, &anchored, sizeof bits);
  __builtin_memcpy(&bits_of_anchor, &ANCHOR, sizeof bits_of_anchor);
  return bits - bits_of_anchor;
}

int absolute(int x) { return x < 0 ? -x : x; }

// value - depth * w / (255 * 30), cut off, for a hue counted from the one opposite to the channel's.
uint8_t level_of(int value, int depth, int hue) {
  const int steps = absolute(absolute(hue) - 90);
  const int w = (steps < 30 ? 30 : steps > 60 ? 60 : steps) - 30;
  const int numerator = 255 * 30 * value - depth * w;
  // In float all 256 whole quotients come out whole, and the others, 1 / (255 * 30) away from those, between them.
  return static_cast<uint8_t>(static_cast<int>(static_cast<float>(numerator) * (1.0f / (255 * 30))));
}

void through_hsv(uint8_t* __restrict reds, uint8_t* __restrict greens, uint8_t* __restrict blues, int64_t count,
                 int turn, float factor) {
  for (int64_t x = 0; x < count; ++x) {
    const int red = reds[x], green = greens[x], blue = blues[x];
    const int more = red > green ? red : green, less = red > green ? green : red;
    const int value = more > blue ? more : blue, chroma = value - (less < blue ? less : blue);
    const int of_red = green - blue, of_green = blue - red + 2 * chroma, of_blue = red - green + 4 * chroma;
    const int sixths = red == value ? of_red : green == value ? of_green : of_blue;
    int hue = (sixths * ratio(30, chroma) + 2048) >> 12;
    hue += turn + (hue < 0 ? 180 : 0);
    hue -= hue >= 180 ? 180 : 0;
    const int saturation = (chroma * ratio(255, value) + 2048) >> 12;
    const int multiplied = static_cast<int>(static_cast<float>(saturation) * factor);
    const int depth = value * (multiplied > 255 ? 255 : multiplied);
    reds[x] = level_of(value, depth, hue - 90);
    greens[x] = level_of(value, depth, hue - 150);
    blues[x] = level_of(value, depth, hue - 30);
  }
}

// levels: (CHANNELS, count)
void distort(const AugmentStep& step, uint8_t* levels, int64_t count) {
  uint8_t *const greens = levels + count, *const blues = greens + count;
  switch (step.kind) {
    case AugmentStep::brightness: return multiply_add(levels, CHANNELS * count, 1, step.value);
    case AugmentStep::contrast: return multiply_add(levels, CHANNELS * count, step.value, 0);
    case AugmentStep::saturation: return through_hsv(levels, greens, blues, count, 0, step.value);
    case AugmentStep::hue:
      return through_hsv(levels, greens, blues, count, (static_cast<int>(step.value) + 180) % 180, 1);
  }
}

void normalise(const uint8_t* __restrict levels, int64_t count, float mean, float scale, float* __restrict to) {
  for (int64_t x = 0; x < count; ++x) to[x] = (static_cast<float>(levels[x]) - mean) * scale;
}

void write(const Augment& p, int64_t y, const uint8_t* levels) {
  for (int c = 0; c < CHANNELS; ++c) {
    const uint8_t* const from = levels + c * p.width;
    const int64_t to = (c * p.height + y) * p.width;
    if (p.is_normalised)
      normalise(from, p.width, p.mean[c], p.scale[c], static_cast<float*>(p.out) + to);
    else
      __builtin_memcpy(static_cast<uint8_t*>(p.out) + to, from, p.width);
  }
}

}  // namespace

namespace APC_ISA {

void augment_rows(const Augment& p, int64_t begin, int64_t end) {
  const Columns columns(p);
  const int64_t bytes = CHANNELS * columns.pixels;
  Scratch<uint8_t> pixels(bytes + WORD), levels(CHANNELS * p.width);
  for (int64_t i = 0; i < WORD; ++i) pixels[bytes + i] = 0;  // gathered beside the last pixel, with weight 0
  Scratch<uint32_t> own(p.width), next(p.width);
  Line lines[] = {Line(p.width), Line(p.width)};  // of an even row, of an odd one
  const auto line_of = [&](int64_t row) -> const Line& {
    Line& line = lines[row % 2];
    if (line.row == row) return line;
    line.row = row;
    read_pixels(p, row, columns, pixels);
    gather(pixels, columns.begins, p.width, own, next);
    between_pixels(own, next, columns.weights, p.width, line.red_blue, line.green);
    return line;
  };
  for (int64_t y = begin; y < end; ++y) {
    const Position position = p.rows.at(p.top + y);
    const uint32_t weight = weight_of_next(p.rows, position);
    const Line &above = line_of(position.index), &below = line_of(weight ? position.next : position.index);
    between_lines(above.red_blue, above.green, below.red_blue, below.green, weight, p.width, levels, levels + p.width,
                  levels + 2 * p.width);
    for (int64_t i = 0; i < p.step_count; ++i) distort(p.steps[i], levels, p.width);
    write(p, y, levels);
  }
}

}  // namespace APC_ISA
