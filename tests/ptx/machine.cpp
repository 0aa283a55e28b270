// The scheduler: which block, which warp, which lanes go on. Orders are drawn from the seed; a warp is preempted at
// barriers and now and then at a memory operation.
#include "machine.h"

#include <algorithm>

#include "forms.h"

namespace ptx {
namespace {

constexpr size_t RESIDENT_BLOCKS = 3;

const Forms& all_forms() {
  static const Forms FORMS = [] {
    Forms forms;
    add_arithmetic(forms), add_conversions(forms), add_memory(forms), add_collectives(forms), add_products(forms);
    return forms;
  }();
  return FORMS;
}

uint64_t special_value(const std::string& name, const Machine& machine, const Block& block, uint32_t thread) {
  const Dimensions& n = machine.threads;
  const Dimensions tid{thread % n.x, thread / n.x % n.y, thread / n.x / n.y};
  const auto axis = [&](const Dimensions& d) { return name.back() == 'x' ? d.x : name.back() == 'y' ? d.y : d.z; };
  if (name == "%laneid") return thread % LANES;
  if (name == "%warpid") return thread / LANES;
  if (name.compare(0, 5, "%tid.") == 0) return axis(tid);
  if (name.compare(0, 6, "%ntid.") == 0) return axis(n);
  if (name.compare(0, 7, "%ctaid.") == 0) return axis(block.index);
  return axis(machine.grid);
}

uint32_t guard_mask(const Warp& warp, const Instruction& instruction) {
  if (!instruction.guarded) return ALL_LANES;
  const uint64_t* predicate = warp.read(instruction.guard);
  uint32_t mask = 0;
  for (unsigned lane = 0; lane < LANES; ++lane) mask |= static_cast<uint32_t>(predicate[lane] & 1) << lane;
  return instruction.negated ? ~mask : mask;
}

// The group that runs next: of those that are not blocked the one at the lowest instruction, after groups at one
// instruction have become one. Null if all are blocked.
Group* next_group(std::vector<Group>& groups) {
  if (groups.size() > 1) {
    std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.pc < b.pc; });
    size_t kept = 0;
    for (size_t i = 1; i < groups.size(); ++i)
      if (groups[i].pc == groups[kept].pc)
        groups[kept].mask |= groups[i].mask, groups[kept].blocked = false;
      else
        groups[++kept] = groups[i];
    groups.resize(kept + 1);
  }
  const auto found = std::find_if(groups.begin(), groups.end(), [](const Group& group) { return !group.blocked; });
  return found == groups.end() ? nullptr : &*found;
}

}  // namespace

const Form* find_form(const std::string& opcode) {
  const auto found = all_forms().find(opcode);
  return found == all_forms().end() ? nullptr : &found->second;
}

std::vector<std::string> known_forms() {
  std::vector<std::string> names;
  for (const auto& [name, form] : all_forms()) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

void Machine::start_block(uint32_t number) {
  auto block = std::make_unique<Block>();
  block->machine = this, block->number = number;
  block->index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  block->shared.assign(shared_bytes ? kernel->dynamic_shared() + shared_bytes : kernel->static_shared, 0xff);
  block->cells.assign(block->shared.size(), Cell());
  const uint32_t count = threads.x * threads.y * threads.z;
  for (uint32_t first = 0; first < count; first += LANES) {
    auto warp = std::make_unique<Warp>();
    warp->block = block.get(), warp->kernel = kernel, warp->index = first / LANES;
    warp->lanes = count - first >= LANES ? ALL_LANES : (1u << (count - first)) - 1;
    warp->started = warp->lanes;
    warp->registers.assign(static_cast<size_t>(kernel->registers) * LANES, ~0ull);
    for (const auto& [place, name] : kernel->special)
      for (unsigned lane = 0; lane < LANES; ++lane)
        warp->write(place)[lane] = special_value(name, *this, *block, first + lane);
    warp->groups.push_back({0, warp->lanes, false});
    block->warps.push_back(std::move(warp));
  }
  counts.blocks += 1;
  resident_.push_back(std::move(block));
}

// Lets the warps of a block go on that all wait at its barrier.
bool Machine::release_barrier(Block& block) {
  Warp* waiting = nullptr;
  bool everyone = true;
  for (const auto& warp : block.warps)
    if (warp->at_barrier)
      waiting = warp.get();
    else
      everyone = false;
  if (!waiting) return false;
  if (!everyone) {
    waiting->pc = waiting->groups[0].pc - 1;
    report("a barrier that not all threads reach", *waiting, 0, 0, "", "some warps have ended");
  }
  for (const auto& warp : block.warps) warp->at_barrier = false;
  block.epoch += 1;
  return true;
}

void Machine::add_results(const Warp& warp, const Instruction& instruction, uint32_t mask) {
  if (instruction.operands.empty() || instruction.operands[0] < 0) return;
  const uint64_t* values = warp.read(instruction.operands[0]);
  uint64_t& sum = counts.sums[static_cast<size_t>(warp.pc)];
  for_lanes(mask, [&](unsigned lane) { sum += mixed(values[lane]); });
}

// Runs until a barrier, the end, or so many memory operations.
bool Machine::run_warp(Warp& warp, int memory_operations) {
  while (!warp.groups.empty()) {
    Group* group = next_group(warp.groups);
    const bool stuck = group == nullptr;
    if (stuck) group = &warp.groups.front(), group->blocked = false;
    const Instruction& instruction = kernel->code[static_cast<size_t>(group->pc)];
    const Kind kind = instruction.form->kind;
    warp.pc = group->pc;
    const uint32_t mask = group->mask & guard_mask(warp, instruction);
    if (++executed_ > budget)
      throw std::runtime_error(kernel->name + ": " + std::to_string(budget) + " instructions and no end");
    if (counting)
      counts.executed[static_cast<size_t>(group->pc)] += 1,
          counts.lanes[static_cast<size_t>(group->pc)] += __builtin_popcount(mask);
    switch (kind) {
      case Kind::plain:
        if (mask) instruction.form->run(warp, instruction, mask);
        if (counting) add_results(warp, instruction, mask);
        ++group->pc;
        break;
      case Kind::memory:
        if (mask) instruction.form->run(warp, instruction, mask);
        ++group->pc;
        if (--memory_operations == 0) return true;
        break;
      case Kind::branch: {
        const uint32_t stay = group->mask & ~mask;
        if (!stay) {
          group->pc = instruction.target;
        } else {
          ++group->pc, group->mask = stay;
          if (mask) warp.groups.push_back({instruction.target, mask, false});
        }
        break;
      }
      case Kind::leave:
        group->mask &= ~mask;
        warp.lanes &= ~mask;
        ++group->pc;
        if (!group->mask) warp.groups.erase(warp.groups.begin() + (group - warp.groups.data()));
        for (Group& other : warp.groups) other.blocked = false;
        break;
      case Kind::convergent:
      case Kind::warp_barrier:
      case Kind::block_barrier: {
        // Waits for the lanes that are elsewhere: a shuffle of some lanes only for those that it names.
        const bool is_shuffle = instruction.form->names_members;
        const uint32_t wanted =
            is_shuffle && mask
                ? static_cast<uint32_t>(warp.read(instruction.operands.back())[__builtin_ctz(mask)]) & warp.lanes
                : warp.lanes;
        if ((wanted & ~group->mask) && !stuck) {
          group->blocked = true;
          break;
        }
        warp.turn += kind != Kind::convergent;
        if (!is_shuffle && mask != warp.lanes)
          report("lanes are missing", warp, static_cast<unsigned>(__builtin_ctz(group->mask)), 0, "",
                 "all lanes of the warp have to be here");
        ++group->pc;
        if (kind == Kind::block_barrier) {
          counts.barriers += warp.index == 0;
          if (warp.lanes != warp.started)
            report("a barrier that not all threads reach", warp, 0, 0, "", "some lanes have ended");
          warp.at_barrier = true;
          return true;
        }
        if (kind == Kind::convergent && mask) instruction.form->run(warp, instruction, mask);
        if (--memory_operations == 0) return true;
        break;
      }
    }
  }
  return false;
}

void Machine::run() {
  random.seed(seed);
  if (kernel->required_threads && threads.x * threads.y * threads.z != static_cast<uint32_t>(kernel->required_threads))
    throw std::invalid_argument(kernel->name + ": expected " + std::to_string(kernel->required_threads) + " threads");
  if (parameters.size() < kernel->parameter_bytes)
    throw std::invalid_argument(kernel->name + ": expected " + std::to_string(kernel->parameter_bytes) +
                                " bytes of parameters, got " + std::to_string(parameters.size()));
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  for (Region& region : regions) {
    if (region.is_output) region.cells.assign(region.size, Cell());
    for (uint8_t& flags : region.flags) flags &= static_cast<uint8_t>(~(was_read | was_written));
  }
  counts.executed.assign(kernel->code.size(), 0), counts.lanes.assign(kernel->code.size(), 0);
  counts.sums.assign(kernel->code.size(), 0);
  std::vector<uint32_t> order(grid.x * grid.y * grid.z);
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  size_t next = 0;
  std::vector<Warp*> ready;
  while ((next < order.size() || !resident_.empty()) && !(one_finding && !findings.empty())) {
    while (next < order.size() && resident_.size() < RESIDENT_BLOCKS) start_block(order[next++]);
    const size_t chosen = random() % resident_.size();
    Block& block = *resident_[chosen];
    ready.clear();
    for (const auto& warp : block.warps)
      if (!warp->at_barrier && !warp->groups.empty()) ready.push_back(warp.get());
    if (ready.empty()) {
      if (!release_barrier(block)) resident_.erase(resident_.begin() + static_cast<std::ptrdiff_t>(chosen));
      continue;
    }
    Warp& warp = *ready[random() % ready.size()];
    // Mostly a few operations, sometimes all up to the next barrier: a warp may be far ahead of the others.
    const uint64_t draw = random() % 8;
    run_warp(warp, draw == 0 ? -1 : static_cast<int>(1 + draw * draw));
  }
}

}  // namespace ptx
