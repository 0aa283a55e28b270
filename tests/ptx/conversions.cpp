// cvt: between integers, from integers to floats, between floats. A conversion into a wider register extends by sign.
#include "forms.h"

namespace ptx {
namespace {

template <typename To, typename From>
void add_between_integers(Forms& forms, const std::string& to, const std::string& from) {
  forms["cvt." + to + "." + from] = lanewise<To, From>([](From a) { return static_cast<To>(a); });
}

template <typename To>
void add_to_integer(Forms& forms, const std::string& to) {
  add_between_integers<To, int8_t>(forms, to, "s8"), add_between_integers<To, uint8_t>(forms, to, "u8");
  add_between_integers<To, int16_t>(forms, to, "s16"), add_between_integers<To, uint16_t>(forms, to, "u16");
  add_between_integers<To, int32_t>(forms, to, "s32"), add_between_integers<To, uint32_t>(forms, to, "u32");
  add_between_integers<To, int64_t>(forms, to, "s64"), add_between_integers<To, uint64_t>(forms, to, "u64");
}

template <typename From>
void add_from_integer(Forms& forms, const std::string& from) {
  forms["cvt.rn.f32." + from] = lanewise<float, From>([](From a) { return static_cast<float>(a); });
  forms["cvt.rn.f64." + from] = lanewise<double, From>([](From a) { return static_cast<double>(a); });
}

uint32_t packed(uint16_t high, uint16_t low) { return static_cast<uint32_t>(high) << 16 | low; }

}  // namespace

void add_conversions(Forms& forms) {
  add_to_integer<int8_t>(forms, "s8"), add_to_integer<uint8_t>(forms, "u8");
  add_to_integer<int16_t>(forms, "s16"), add_to_integer<uint16_t>(forms, "u16");
  add_to_integer<int32_t>(forms, "s32"), add_to_integer<uint32_t>(forms, "u32");
  add_to_integer<int64_t>(forms, "s64"), add_to_integer<uint64_t>(forms, "u64");
  add_from_integer<int16_t>(forms, "s16"), add_from_integer<uint16_t>(forms, "u16");
  add_from_integer<int32_t>(forms, "s32"), add_from_integer<uint32_t>(forms, "u32");
  add_from_integer<int64_t>(forms, "s64"), add_from_integer<uint64_t>(forms, "u64");
  forms["cvt.f64.f32"] = lanewise<double, float>([](float a) { return static_cast<double>(a); });
  forms["cvt.rn.f32.f64"] = lanewise<float, double>([](double a) { return canonical(static_cast<float>(a)); });
  forms["cvt.f32.f16"] = lanewise<float, uint16_t>([](uint16_t a) { return canonical(from_float16(a)); });
  forms["cvt.f32.bf16"] = lanewise<float, uint16_t>([](uint16_t a) { return canonical(from_bfloat16(a)); });
  forms["cvt.rn.f16.f32"] = lanewise<uint16_t, float>([](float a) { return to_float16(a); });
  forms["cvt.rn.bf16.f32"] = lanewise<uint16_t, float>([](float a) { return to_bfloat16(a); });
  forms["cvt.rn.f16x2.f32"] =
      lanewise<uint32_t, float, float>([](float a, float b) { return packed(to_float16(a), to_float16(b)); });
  forms["cvt.rn.bf16x2.f32"] =
      lanewise<uint32_t, float, float>([](float a, float b) { return packed(to_bfloat16(a), to_bfloat16(b)); });
  forms["cvt.sat.f32.f32"] =
      lanewise<float, float>([](float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; });  // NaN: 0
  forms["cvta.to.global.u64"] = forms["cvta.global.u64"] = lanewise<uint64_t, uint64_t>([](uint64_t a) { return a; });
}

}  // namespace ptx
