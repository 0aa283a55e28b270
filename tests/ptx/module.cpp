// The Python module ptx_machine: parse a module, place tensors, run a launch, read what was found.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;
using namespace ptx;

namespace {

py::dict described(const Finding& f) {
  py::dict d;
  d["kind"] = f.kind, d["kernel"] = f.kernel, d["line"] = f.line, d["text"] = f.text, d["source"] = f.source;
  d["block"] = py::make_tuple(f.block_x, f.block_y, f.block_z), d["warp"] = f.warp, d["lane"] = f.lane;
  d["address"] = f.address, d["tensor"] = f.tensor, d["detail"] = f.detail;
  return d;
}

// A tensor's bytes may be touched where `elements` says so: an array of flags, one for each byte from `begin` on.
struct Memory {
  std::vector<Region> regions;

  void add(const std::string& name, uint64_t begin, uint64_t origin, py::array_t<uint8_t> flags, bool is_output) {
    const uint8_t* data = flags.data();
    regions.push_back(
        {name, begin, static_cast<uint64_t>(flags.size()), origin, is_output, {data, data + flags.size()}, {}});
  }
  py::array_t<uint8_t> flags(const std::string& name) const {
    for (const Region& region : regions)
      if (region.name == name)
        return py::array_t<uint8_t>(static_cast<py::ssize_t>(region.flags.size()), region.flags.data());
    throw std::out_of_range("no tensor is called " + name);
  }
};

py::dict launch(const Module& module, const std::string& name, Memory& memory,
                std::tuple<uint32_t, uint32_t, uint32_t> grid, std::tuple<uint32_t, uint32_t, uint32_t> threads,
                uint32_t shared_bytes, const py::bytes& parameters, uint64_t seed, bool counting, uint64_t budget,
                bool one_finding) {
  const auto found = module.kernels.find(name);
  if (found == module.kernels.end()) throw std::out_of_range("no kernel is called " + name);
  Machine machine;
  machine.module = &module, machine.kernel = found->second.get();
  machine.grid = {std::get<0>(grid), std::get<1>(grid), std::get<2>(grid)};
  machine.threads = {std::get<0>(threads), std::get<1>(threads), std::get<2>(threads)};
  machine.shared_bytes = shared_bytes, machine.seed = seed, machine.counting = counting, machine.budget = budget;
  machine.one_finding = one_finding;
  const std::string_view bytes = parameters;
  machine.parameters.assign(bytes.begin(), bytes.end());
  machine.regions.swap(memory.regions);
  try {
    machine.run();
  } catch (...) {
    machine.regions.swap(memory.regions);
    throw;
  }
  machine.regions.swap(memory.regions);
  for (Region& region : memory.regions) region.cells = {};  // copies of the memory are to be cheap
  py::dict result;
  py::list findings;
  for (const Finding& finding : machine.findings) findings.append(described(finding));
  result["findings"] = findings;
  if (counting) {
    const Counts& c = machine.counts;
    std::map<std::string, std::pair<uint64_t, uint64_t>> by_opcode;
    for (size_t pc = 0; pc < machine.kernel->code.size(); ++pc) {
      auto& [warps, lanes] = by_opcode[machine.kernel->opcodes[static_cast<size_t>(machine.kernel->code[pc].opcode)]];
      warps += c.executed[pc], lanes += c.lanes[pc];
    }
    py::dict opcodes;
    for (const auto& [opcode, n] : by_opcode) opcodes[py::str(opcode)] = py::make_tuple(n.first, n.second);
    result["opcodes"] = opcodes;
    py::dict lines;  // those that were executed, each with the sum of what it computed
    for (size_t pc = 0; pc < machine.kernel->code.size(); ++pc)
      if (c.lanes[pc]) lines[py::int_(machine.kernel->lines[pc])] = c.sums[pc];
    result["executed_lines"] = lines;
    std::map<std::string, std::array<uint64_t, 3>> tensors;  // bytes, and how many of them were read and were written
    for (const Region& region : memory.regions) {
      auto& [bytes, read, written] = tensors[region.name];
      for (const uint8_t flags : region.flags)
        bytes += !!(flags & addressable), read += !!(flags & was_read), written += !!(flags & was_written);
    }
    result["tensors"] = tensors;
    result["global_read_bytes"] = c.global_read_bytes, result["global_written_bytes"] = c.global_written_bytes;
    result["global_read_sectors"] = c.global_read_sectors, result["global_written_sectors"] = c.global_written_sectors;
    result["shared_accesses"] = c.shared_accesses, result["bank_conflicts"] = c.bank_conflicts;
    result["addresses"] = c.addresses;
    result["barriers"] = c.barriers, result["blocks"] = c.blocks;
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(ptx_machine, module) {
  py::register_exception<ParseError>(module, "ParseError", PyExc_ValueError);
  py::class_<Module>(module, "Module")
      .def_readonly("target", &Module::target)
      .def_property_readonly("kernels",
                             [](const Module& self) {
                               std::vector<std::string> names;
                               for (const auto& [name, kernel] : self.kernels) names.push_back(name);
                               return names;
                             })
      .def("parameters",
           [](const Module& self, const std::string& kernel) {
             std::vector<std::pair<uint32_t, uint32_t>> result;
             for (const Parameter& p : self.kernels.at(kernel)->parameters) result.emplace_back(p.offset, p.size);
             return result;
           })
      .def("forms", [](const Module& self, const std::string& kernel) { return self.kernels.at(kernel)->opcodes; });
  py::class_<Memory>(module, "Memory")
      .def(py::init<>())
      .def("add", &Memory::add)
      .def("flags", &Memory::flags)
      .def("copy", [](const Memory& self) { return Memory(self); });
  module.def("parse", [](const std::string& text) { return parse(text); });
  module.def("known_forms", known_forms);
  module.def("launch", launch, py::arg("module"), py::arg("kernel"), py::arg("memory"), py::arg("grid"),
             py::arg("threads"), py::arg("shared_bytes"), py::arg("parameters"), py::arg("seed") = 0,
             py::arg("counting") = false, py::arg("budget") = 1ull << 40, py::arg("one_finding") = false);
}
