// Arithmetic, comparison, selection, moves. float32 results that are NaN are the one canonical NaN; `ftz` flushes
// subnormal inputs and results. div.full is the exact quotient, ex2.approx and its kin the exact function rounded once:
// a GPU may be off by 2 units in the last place.
#include <algorithm>
#include <cfenv>

#include "forms.h"

namespace ptx {
namespace {

template <typename T>
using Unsigned = std::make_unsigned_t<T>;

// Wider than T, so that no product overflows.
template <typename T>
struct Wide;
template <>
struct Wide<int16_t> {
  using type = int32_t;
};
template <>
struct Wide<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wide<int32_t> {
  using type = int64_t;
};
template <>
struct Wide<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wide<int64_t> {
  using type = __int128;
};
template <>
struct Wide<uint64_t> {
  using type = unsigned __int128;
};

template <typename T>
T wrapped(typename Wide<T>::type value) {
  return static_cast<T>(static_cast<Unsigned<T>>(value));
}

// The other one where one is NaN; -0 is below +0.
template <typename T>
T minimum(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}

template <typename T>
T maximum(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  return a > b || (a == b && std::signbit(b)) ? a : b;
}

__attribute__((noinline, optimize("rounding-math"))) float fma_down(float a, float b, float c) {
  std::fesetround(FE_DOWNWARD);
  const volatile float x = a, y = b, z = c;
  const volatile float sum = std::fma(x, y, z);
  std::fesetround(FE_TONEAREST);
  return canonical(sum);
}

template <typename T>
T shifted_left(T a, uint32_t by) {
  return by >= 8 * sizeof(T) ? T(0) : static_cast<T>(static_cast<uint64_t>(a) << by);
}

template <typename T>
T shifted_right(T a, uint32_t by) {
  if (by >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  return static_cast<T>(a >> by);
}

// `length` bits from `position` on; of signed numbers the last of them, or the number's own, is the sign.
template <typename T>
T bit_field(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t BITS = 8 * sizeof(T);
  position &= 0xff, length &= 0xff;
  const uint64_t bits = static_cast<Unsigned<T>>(a);
  uint64_t field = position < BITS ? bits >> position : 0;
  const uint32_t last = std::min(position + length - 1, BITS - 1);
  const bool sign = std::is_signed_v<T> && length > 0 && (bits >> last & 1);
  if (length < BITS) field &= (1ull << length) - 1;
  const uint32_t present = std::min(length, position < BITS ? BITS - position : 0);
  if (sign && present < BITS) field |= ~0ull << present;
  return static_cast<T>(length == 0 ? 0 : field);
}

// Four bytes out of eight; bit 3 of a selector repeats the byte's sign instead.
uint32_t permuted(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> 4 * i & 0xf;
    const uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (selector & 7) & 0xff);
    result |= (selector & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}

template <typename T>
void add_integers(Forms& forms, const std::string& type) {  // s32
  using W = typename Wide<T>::type;
  forms["add." + type] = lanewise<T, T, T>([](T a, T b) { return wrapped<T>(W(a) + W(b)); });
  forms["sub." + type] = lanewise<T, T, T>([](T a, T b) { return wrapped<T>(W(a) - W(b)); });
  forms["mul.lo." + type] = lanewise<T, T, T>([](T a, T b) { return wrapped<T>(W(a) * W(b)); });
  forms["mul.hi." + type] = lanewise<T, T, T>([](T a, T b) { return static_cast<T>((W(a) * W(b)) >> 8 * sizeof(T)); });
  forms["mad.lo." + type] =
      lanewise<T, T, T, T>([](T a, T b, T c) { return wrapped<T>(W(wrapped<T>(W(a) * W(b))) + W(c)); });
  forms["min." + type] = lanewise<T, T, T>([](T a, T b) { return std::min(a, b); });
  forms["max." + type] = lanewise<T, T, T>([](T a, T b) { return std::max(a, b); });
  // Division by zero is not defined; all bits set is what GPUs give.
  forms["div." + type] = lanewise<T, T, T>([](T a, T b) { return b == 0 ? T(-1) : wrapped<T>(W(a) / W(b)); });
  forms["rem." + type] = lanewise<T, T, T>([](T a, T b) { return b == 0 ? a : wrapped<T>(W(a) % W(b)); });
  forms["shr." + type] = lanewise<T, T, uint32_t>([](T a, uint32_t by) { return shifted_right(a, by); });
  if constexpr (std::is_signed_v<T>) {
    forms["neg." + type] = lanewise<T, T>([](T a) { return wrapped<T>(-W(a)); });
    forms["abs." + type] = lanewise<T, T>([](T a) { return wrapped<T>(a < 0 ? -W(a) : W(a)); });
  }
  if constexpr (sizeof(T) < 8) {
    forms["mul.wide." + type] = lanewise<W, T, T>([](T a, T b) { return W(a) * W(b); });
    forms["mad.wide." + type] = lanewise<W, T, T, W>([](T a, T b, W c) {
      return static_cast<W>(static_cast<Unsigned<W>>(W(a) * W(b)) + static_cast<Unsigned<W>>(c));
    });
  }
  if constexpr (sizeof(T) >= 4)
    forms["bfe." + type] =
        lanewise<T, T, uint32_t, uint32_t>([](T a, uint32_t p, uint32_t n) { return bit_field(a, p, n); });
}

template <typename T>
void add_bits(Forms& forms, const std::string& type) {  // b32
  forms["and." + type] = lanewise<T, T, T>([](T a, T b) { return static_cast<T>(a & b); });
  forms["or." + type] = lanewise<T, T, T>([](T a, T b) { return static_cast<T>(a | b); });
  forms["xor." + type] = lanewise<T, T, T>([](T a, T b) { return static_cast<T>(a ^ b); });
  forms["not." + type] = lanewise<T, T>([](T a) { return static_cast<T>(a ^ static_cast<T>(~0ull)); });
  if constexpr (!std::is_same_v<T, bool>) {
    forms["shl." + type] = lanewise<T, T, uint32_t>([](T a, uint32_t by) { return shifted_left(a, by); });
    forms["shr." + type] = lanewise<T, T, uint32_t>([](T a, uint32_t by) { return shifted_right(a, by); });
  }
}

template <typename T>
void add_ordered_comparisons(Forms& forms, const std::string& type) {
  forms["setp.lt." + type] = lanewise<bool, T, T>([](T a, T b) { return a < b; });
  forms["setp.le." + type] = lanewise<bool, T, T>([](T a, T b) { return a <= b; });
  forms["setp.gt." + type] = lanewise<bool, T, T>([](T a, T b) { return a > b; });
  forms["setp.ge." + type] = lanewise<bool, T, T>([](T a, T b) { return a >= b; });
}

template <typename T>
void add_equality(Forms& forms, const std::string& type) {
  forms["setp.eq." + type] = lanewise<bool, T, T>([](T a, T b) { return a == b; });
  // Of floats too: `ne` is ordered, false where one is NaN.
  forms["setp.ne." + type] = lanewise<bool, T, T>([](T a, T b) { return a == a && b == b && a != b; });
}

template <typename T>
void add_floats(Forms& forms, const std::string& type) {
  forms["add." + type] = forms["add.rn." + type] = lanewise<T, T, T>([](T a, T b) { return canonical(a + b); });
  forms["sub." + type] = forms["sub.rn." + type] = lanewise<T, T, T>([](T a, T b) { return canonical(a - b); });
  forms["mul." + type] = forms["mul.rn." + type] = lanewise<T, T, T>([](T a, T b) { return canonical(a * b); });
  forms["div.rn." + type] = lanewise<T, T, T>([](T a, T b) { return canonical(a / b); });
  forms["rcp.rn." + type] = lanewise<T, T>([](T a) { return canonical(T(1) / a); });
  forms["sqrt.rn." + type] = lanewise<T, T>([](T a) { return canonical(std::sqrt(a)); });
  forms["fma.rn." + type] = lanewise<T, T, T, T>([](T a, T b, T c) { return canonical(std::fma(a, b, c)); });
  forms["min." + type] = lanewise<T, T, T>([](T a, T b) { return minimum(a, b); });
  forms["max." + type] = lanewise<T, T, T>([](T a, T b) { return maximum(a, b); });
  forms["neg." + type] = lanewise<T, T>([](T a) { return -a; });
  forms["abs." + type] = lanewise<T, T>([](T a) { return std::fabs(a); });
  add_ordered_comparisons<T>(forms, type);
  add_equality<T>(forms, type);
  forms["setp.ltu." + type] = lanewise<bool, T, T>([](T a, T b) { return !(a >= b); });
  forms["setp.leu." + type] = lanewise<bool, T, T>([](T a, T b) { return !(a > b); });
  forms["setp.gtu." + type] = lanewise<bool, T, T>([](T a, T b) { return !(a <= b); });
  forms["setp.geu." + type] = lanewise<bool, T, T>([](T a, T b) { return !(a < b); });
  forms["setp.equ." + type] = lanewise<bool, T, T>([](T a, T b) { return a != a || b != b || a == b; });
  forms["setp.neu." + type] = lanewise<bool, T, T>([](T a, T b) { return a != b; });
  forms["setp.num." + type] = lanewise<bool, T, T>([](T a, T b) { return a == a && b == b; });
  forms["setp.nan." + type] = lanewise<bool, T, T>([](T a, T b) { return a != a || b != b; });
}

void add_float32(Forms& forms) {
  forms["div.full.f32"] = forms["div.rn.f32"];
  forms["max.NaN.f32"] = lanewise<float, float, float>(
      [](float a, float b) { return a != a || b != b ? canonical(a + b) : maximum(a, b); });
  forms["fma.rm.f32"] =
      lanewise<float, float, float, float>([](float a, float b, float c) { return fma_down(a, b, c); });
  forms["fma.rn.ftz.f32"] = lanewise<float, float, float, float>(
      [](float a, float b, float c) { return flushed(canonical(std::fma(flushed(a), flushed(b), flushed(c)))); });
  forms["mul.ftz.f32"] =
      lanewise<float, float, float>([](float a, float b) { return flushed(canonical(flushed(a) * flushed(b))); });
  forms["add.ftz.f32"] =
      lanewise<float, float, float>([](float a, float b) { return flushed(canonical(flushed(a) + flushed(b))); });
  forms["ex2.approx.f32"] =
      lanewise<float, float>([](float a) { return canonical(static_cast<float>(std::exp2(static_cast<double>(a)))); });
  forms["ex2.approx.ftz.f32"] = lanewise<float, float>(
      [](float a) { return flushed(canonical(static_cast<float>(std::exp2(static_cast<double>(flushed(a)))))); });
  forms["lg2.approx.f32"] =
      lanewise<float, float>([](float a) { return canonical(static_cast<float>(std::log2(static_cast<double>(a)))); });
  forms["rcp.approx.f32"] = forms["rcp.rn.f32"];
  forms["rcp.approx.ftz.f32"] = lanewise<float, float>([](float a) { return flushed(canonical(1 / flushed(a))); });
}

template <float FROM(uint16_t), uint16_t TO(float), float CHOOSE(float, float)>
uint16_t chosen(uint16_t a, uint16_t b) {
  return TO(CHOOSE(FROM(a), FROM(b)));  // exact: it is one of the two
}

// A form of numbers of 16 bits, and of two of them in a register.
template <uint16_t CHOOSE(uint16_t, uint16_t)>
void add_choice(Forms& forms, const std::string& form) {
  forms[form] = lanewise<uint16_t, uint16_t, uint16_t>([](uint16_t a, uint16_t b) { return CHOOSE(a, b); });
  forms[form + "x2"] = lanewise<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b) {
    const uint16_t low = CHOOSE(static_cast<uint16_t>(a), static_cast<uint16_t>(b));
    const uint16_t high = CHOOSE(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16));
    return static_cast<uint32_t>(high) << 16 | low;
  });
}

template <typename T>
void add_moves(Forms& forms, std::initializer_list<const char*> types) {
  for (const std::string type : types) {
    forms["mov." + type] = lanewise<T, T>([](T a) { return a; });
    forms["selp." + type] = lanewise<T, T, T, bool>([](T a, T b, bool first) { return first ? a : b; });
  }
}

// One register taken apart into N, and N put together into one, the first in the low bits.
template <unsigned BITS, unsigned N>
void add_packing(Forms& forms, const std::string& type) {
  constexpr unsigned PART = BITS / N;
  constexpr uint64_t LOW = ~0ull >> (64 - PART);
  forms["mov." + type + ".pack" + std::to_string(N)] = {
      Kind::plain,
      [](Warp& warp, const Instruction& instruction, uint32_t mask) {
        for_lanes(mask, [&](unsigned lane) {
          uint64_t bits = 0;
          for (unsigned i = 0; i < N; ++i) bits |= (warp.read(instruction.operands[1 + i])[lane] & LOW) << i * PART;
          warp.write(instruction.operands[0])[lane] = bits;
        });
      },
      1 + N};
  forms["mov." + type + ".unpack" + std::to_string(N)] = {
      Kind::plain,
      [](Warp& warp, const Instruction& instruction, uint32_t mask) {
        for_lanes(mask, [&](unsigned lane) {
          const uint64_t bits = warp.read(instruction.operands[N])[lane];
          for (unsigned i = 0; i < N; ++i) warp.write(instruction.operands[i])[lane] = bits >> i * PART & LOW;
        });
      },
      1 + N};
}

}  // namespace

void add_arithmetic(Forms& forms) {
  add_integers<int16_t>(forms, "s16"), add_integers<uint16_t>(forms, "u16");
  add_integers<int32_t>(forms, "s32"), add_integers<uint32_t>(forms, "u32");
  forms["min.relu.s32"] =
      lanewise<int32_t, int32_t, int32_t>([](int32_t a, int32_t b) { return std::max(std::min(a, b), 0); });
  add_integers<int64_t>(forms, "s64"), add_integers<uint64_t>(forms, "u64");
  add_bits<bool>(forms, "pred"), add_bits<uint16_t>(forms, "b16");
  add_bits<uint32_t>(forms, "b32"), add_bits<uint64_t>(forms, "b64");
  add_ordered_comparisons<int16_t>(forms, "s16"), add_ordered_comparisons<uint16_t>(forms, "u16");
  add_ordered_comparisons<int32_t>(forms, "s32"), add_ordered_comparisons<uint32_t>(forms, "u32");
  add_ordered_comparisons<int64_t>(forms, "s64"), add_ordered_comparisons<uint64_t>(forms, "u64");
  for (const char* sign : {"b", "s", "u"}) {
    add_equality<uint16_t>(forms, sign + std::string("16"));
    add_equality<uint32_t>(forms, sign + std::string("32"));
    add_equality<uint64_t>(forms, sign + std::string("64"));
  }
  add_floats<float>(forms, "f32"), add_floats<double>(forms, "f64");
  add_float32(forms);
  add_choice<chosen<from_bfloat16, to_bfloat16, minimum<float>>>(forms, "min.bf16");
  add_choice<chosen<from_bfloat16, to_bfloat16, maximum<float>>>(forms, "max.bf16");
  add_choice<chosen<from_float16, to_float16, minimum<float>>>(forms, "min.f16");
  add_choice<chosen<from_float16, to_float16, maximum<float>>>(forms, "max.f16");
  add_moves<bool>(forms, {"pred"});
  add_moves<uint16_t>(forms, {"b16", "u16", "s16"});
  add_moves<uint32_t>(forms, {"b32", "u32", "s32", "f32"});
  add_moves<uint64_t>(forms, {"b64", "u64", "s64", "f64"});
  forms["prmt.b32"] = lanewise<uint32_t, uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b, uint32_t selectors) { return permuted(a, b, selectors); });
  forms["shf.l.wrap.b32"] =
      lanewise<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t low, uint32_t high, uint32_t by) {
        return by % 32 ? high << by % 32 | low >> (32 - by % 32) : high;
      });
  forms["add.s16x2"] = lanewise<uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b) { return ((a + (b & 0xffff0000u)) & 0xffff0000u) | ((a + b) & 0xffffu); });
  add_packing<32, 2>(forms, "b32"), add_packing<64, 2>(forms, "b64"), add_packing<64, 4>(forms, "b64");
}

}  // namespace ptx
