// Products of matrices. A result is the accumulator plus the products, summed in float64 in the order of k and rounded
// once to float32; mma of float64 adds product by product, fused. A GPU's tensor cores add in an order of their own.
#include <algorithm>

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

// A matrix of 16-bit numbers in shared memory, as wgmma's descriptors say where: `across` counts along m or n. Rows of
// 8 numbers lie 16 bytes wide in swizzled blocks of `pieces` times that; the address's bits 7 and up are mixed into
// those from 4 on.
struct Descriptor {
  uint32_t start, leading, stride, pieces;  // pieces: 1 without a swizzle

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        pieces(1u << (4 - (bits >> 62)) % 4) {}

  uint32_t address(uint32_t across, uint32_t k, bool transposed) const {
    uint32_t offset;
    if (!transposed && pieces == 1)
      offset = k % 8 * 2 + k / 8 * leading + across % 8 * 16 + across / 8 * stride;
    else if (!transposed)
      offset = k * 2 + across % 8 * pieces * 16 + across / 8 * stride;
    else if (pieces == 1)
      offset = across % 8 * 2 + across / 8 * stride + k % 8 * 16 + k / 8 * leading;
    else
      offset = across % (8 * pieces) * 2 + across / (8 * pieces) * leading + k % 8 * pieces * 16 + k / 8 * stride;
    const uint32_t address = start + offset;
    return address ^ (address >> 7 & (pieces - 1)) << 4;
  }
};

// Reads a number for the tensor cores. Since it was written, a fence.proxy.async has to have passed: in the warp that
// wrote, or, once a barrier has shown it the number, in the one that reads.
template <Convert convert>
double read_async(Warp& warp, uint32_t address, AsyncProducts::Group& group) {
  Block& block = *warp.block;
  const uint8_t* at = block.machine->shared(warp, 0, address, 2, false, nullptr, ~0ull);
  if (!at) return std::numeric_limits<double>::quiet_NaN();
  const Cell& cell = block.cells[address];
  const bool fenced_here = warp.fence_epoch > cell.write_epoch;
  if (cell.writer_block && !fenced_here && block.warps[cell.writing_warp]->fences == cell.write_fences)
    block.machine->report("no fence.proxy.async", warp, 0, address, "shared memory", "since the numbers were written");
  group.read.emplace_back(address, 2);
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return static_cast<double>(convert(bits));
}

// 64 x 16 by 16 x N, four warps. Each has 16 rows: of a, in its registers as those of mma or in shared memory, and of
// d, where lane 4g + t holds rows g and g + 8 of columns 8j + 2t and 8j + 2t + 1. So each computes its own, when it
// comes.
template <unsigned N, Convert convert>
void wgmma(Warp& warp, const Instruction& instruction, uint32_t) {
  Machine& machine = *warp.block->machine;
  const std::vector<int>& operands = instruction.operands;
  const bool in_registers = operands.size() == N / 2 + 9;
  if (!in_registers && operands.size() != N / 2 + 7)
    throw std::invalid_argument("wgmma: an unknown number of operands");
  if (!warp.products.fenced) machine.report("no wgmma.fence", warp, 0, 0, "", "since the last wait");
  const auto value = [&](size_t from_end) {
    return static_cast<int64_t>(warp.read(operands[operands.size() - from_end])[0]);
  };
  const bool transposed_b = value(1) & 1, transposed_a = !in_registers && (value(2) & 1);
  const size_t scales = in_registers ? 3 : 4;
  const double sign =
      static_cast<double>(static_cast<int32_t>(value(scales)) * static_cast<int32_t>(value(scales - 1)));
  const bool accumulates = value(scales + 1) & 1;
  AsyncProducts::Group& group = warp.products.uncommitted;
  group.epoch = warp.block->epoch, group.pc = warp.pc;

  double a[16][16], b[N][16];
  if (in_registers) {
    for (unsigned lane = 0; lane < LANES; ++lane)
      for (unsigned part = 0; part < 4; ++part)
        for (unsigned i = 0; i < 2; ++i)
          a[lane / 4 + part % 2 * 8][lane % 4 * 2 + i + part / 2 * 8] =
              half_of<convert>(warp.read(operands[N / 2 + part]), lane, i);
  } else {
    const Descriptor descriptor(static_cast<uint64_t>(value(scales + 3)));
    for (unsigned row = 0; row < 16; ++row)
      for (unsigned k = 0; k < 16; ++k)
        a[row][k] = read_async<convert>(warp, descriptor.address(warp.index % 4 * 16 + row, k, transposed_a), group);
  }
  const Descriptor descriptor(static_cast<uint64_t>(value(scales + 2)));
  for (unsigned column = 0; column < N; ++column)
    for (unsigned k = 0; k < 16; ++k)
      b[column][k] = read_async<convert>(warp, descriptor.address(column, k, transposed_b), group);

  for (unsigned i = 0; i < N / 2; ++i) {
    const uint64_t* before = warp.read(operands[i]);
    const auto search = [&](const AsyncProducts::Group& in) {
      for (const auto& [place, lanes] : in.results)
        if (place == operands[i]) before = lanes.data();
    };
    for (const AsyncProducts::Group& earlier : warp.products.committed) search(earlier);
    search(group);
    std::array<uint64_t, LANES> after;
    for (unsigned lane = 0; lane < LANES; ++lane) {
      const double *row = a[lane / 4 + i / 2 % 2 * 8], *column = b[i / 4 * 8 + lane % 4 * 2 + i % 2];
      double sum = 0;
      for (unsigned k = 0; k < 16; ++k) sum += row[k] * column[k];
      const double start = accumulates ? static_cast<double>(value_of<float>(before[lane])) : 0.0;
      after[lane] = bits_of(canonical(static_cast<float>(start + sign * sum)));
    }
    group.results.emplace_back(operands[i], after);
    std::fill_n(warp.write(operands[i]), LANES, 0x7fffffffu);  // in flight: NaN for whoever looks
  }
}

void wait_for_products(Warp& warp, size_t allowed) {
  Block& block = *warp.block;
  while (warp.products.committed.size() > allowed) {
    const AsyncProducts::Group& group = warp.products.committed.front();
    for (const auto& [address, bytes] : group.read) {
      const Cell& cell = block.cells[address];
      if (cell.writer_block && cell.write_epoch > group.epoch) {
        const int pc = std::exchange(warp.pc, group.pc);
        block.machine->report("written while wgmma reads", warp, 0, address, "shared memory", "");
        warp.pc = pc;
      }
      block.machine->shared(warp, 0, address, bytes, false, nullptr, ~0ull);
    }
    for (const auto& [place, lanes] : group.results) std::copy(lanes.begin(), lanes.end(), warp.write(place));
    warp.products.committed.pop_front();
  }
  warp.products.fenced = false;
}

template <unsigned N>
void add_wgmma(Forms& forms) {
  const std::string name = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(N) + "k16.f32.";
  forms[name + "bf16.bf16"] = {Kind::convergent, wgmma<N, from_bfloat16>, -1};
  forms[name + "f16.f16"] = {Kind::convergent, wgmma<N, from_float16>, -1};
}

}  // namespace

void add_products(Forms& forms) {
  const std::string mma = "mma.sync.aligned.";
  forms[mma + "m16n8k16.row.col.f32.bf16.bf16.f32"] = {Kind::convergent, mma_m16n8k16<from_bfloat16>, 14};
  forms[mma + "m16n8k16.row.col.f32.f16.f16.f32"] = {Kind::convergent, mma_m16n8k16<from_float16>, 14};
  forms[mma + "m8n8k4.row.col.f64.f64.f64.f64"] = {Kind::convergent, mma_m8n8k4, 6};
  add_wgmma<8>(forms), add_wgmma<16>(forms), add_wgmma<32>(forms), add_wgmma<64>(forms), add_wgmma<128>(forms);
  forms["wgmma.fence.sync.aligned"] = {
      Kind::convergent, [](Warp& warp, const Instruction&, uint32_t) { warp.products.fenced = true; }, 0};
  forms["wgmma.commit_group.sync.aligned"] = {Kind::convergent,
                                              [](Warp& warp, const Instruction&, uint32_t) {
                                                warp.products.committed.push_back(std::move(warp.products.uncommitted));
                                                warp.products.uncommitted = {};
                                              },
                                              0};
  forms["wgmma.wait_group.sync.aligned"] = {Kind::convergent,
                                            [](Warp& warp, const Instruction& instruction, uint32_t) {
                                              wait_for_products(warp, warp.read(instruction.operands[0])[0]);
                                            },
                                            1};
  forms["fence.proxy.async.shared::cta"] = forms["fence.proxy.async"] = {
      Kind::convergent,
      [](Warp& warp, const Instruction&, uint32_t) { ++warp.fences, warp.fence_epoch = warp.block->epoch; }, 0};
}

}  // namespace ptx
