// Products of matrices. A result is the accumulator plus the products, summed in float64 in the order of k and rounded
// once to float32; mma of float64 adds product by product, fused. A GPU's tensor cores add in an order of their own.
#include "forms.h"

namespace ptx {
namespace {

using Convert = float (*)(uint16_t);

// The i-th 16-bit number of a register.
template <Convert convert>
double half_of(const uint64_t* lanes, unsigned lane, unsigned i) {
  return static_cast<double>(convert(static_cast<uint16_t>(lanes[lane] >> 16 * i)));
}

// Lane 4g + t holds, of a (16 x 16), rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9; of b (16 x 8) those as rows
// of column g; of c (16 x 8) rows g and g + 8, columns 2t and 2t + 1.
template <Convert convert>
void mma_m16n8k16(Warp& warp, const Instruction& instruction, uint32_t) {
  double a[16][16], b[8][16];
  for (unsigned lane = 0; lane < LANES; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned part = 0; part < 4; ++part)
      for (unsigned i = 0; i < 2; ++i)
        a[g + part % 2 * 8][2 * t + i + part / 2 * 8] =
            half_of<convert>(warp.read(instruction.operands[4 + part]), lane, i);
    for (unsigned part = 0; part < 2; ++part)
      for (unsigned i = 0; i < 2; ++i)
        b[g][2 * t + i + part * 8] = half_of<convert>(warp.read(instruction.operands[8 + part]), lane, i);
  }
  for (unsigned part = 0; part < 4; ++part) {
    const uint64_t* c = warp.read(instruction.operands[10 + part]);
    uint64_t* d = warp.write(instruction.operands[part]);
    for (unsigned lane = 0; lane < LANES; ++lane) {
      const double *row = a[lane / 4 + part / 2 * 8], *column = b[lane % 4 * 2 + part % 2];
      double sum = 0;
      for (unsigned k = 0; k < 16; ++k) sum += row[k] * column[k];
      d[lane] = bits_of(canonical(static_cast<float>(static_cast<double>(value_of<float>(c[lane])) + sum)));
    }
  }
}

// Lane 4g + t holds a[g][t], b[t][g], c[g][2t] and c[g][2t + 1].
void mma_m8n8k4(Warp& warp, const Instruction& instruction, uint32_t) {
  double a[8][4], b[4][8];
  for (unsigned lane = 0; lane < LANES; ++lane) {
    a[lane / 4][lane % 4] = value_of<double>(warp.read(instruction.operands[2])[lane]);
    b[lane % 4][lane / 4] = value_of<double>(warp.read(instruction.operands[3])[lane]);
  }
  for (unsigned part = 0; part < 2; ++part) {
    const uint64_t* c = warp.read(instruction.operands[4 + part]);
    uint64_t* d = warp.write(instruction.operands[part]);
    for (unsigned lane = 0; lane < LANES; ++lane) {
      double sum = value_of<double>(c[lane]);
      for (unsigned k = 0; k < 4; ++k) sum = std::fma(a[lane / 4][k], b[k][lane % 4 * 2 + part], sum);
      d[lane] = bits_of(sum);
    }
  }
}

}  // namespace

void add_products(Forms& forms) {
  const std::string mma = "mma.sync.aligned.";
  forms[mma + "m16n8k16.row.col.f32.bf16.bf16.f32"] = {Kind::convergent, mma_m16n8k16<from_bfloat16>, 14};
  forms[mma + "m16n8k16.row.col.f32.f16.f16.f32"] = {Kind::convergent, mma_m16n8k16<from_float16>, 14};
  forms[mma + "m8n8k4.row.col.f64.f64.f64.f64"] = {Kind::convergent, mma_m8n8k4, 6};
}

}  // namespace ptx
