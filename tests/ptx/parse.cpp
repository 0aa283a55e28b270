// PTX text into a Module. What is not understood is an error that quotes its line; nothing is skipped but debug data.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>

#include "machine.h"

namespace ptx {
namespace {

struct Source {
  int file, line, inlined_file, inlined_line;
};

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '.' || c == '%';
}

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> result;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = text.find_first_not_of(" \t\r\n,", at);
    if (begin == std::string::npos) break;
    at = std::min(text.size(), text.find_first_of(" \t\r\n,", begin));
    result.push_back(text.substr(begin, at - begin));
  }
  return result;
}

// Splits at commas that stand in no bracket.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    if (i < text.size() && (text[i] == '{' || text[i] == '[' || text[i] == '(')) ++depth;
    if (i < text.size() && (text[i] == '}' || text[i] == ']' || text[i] == ')')) --depth;
    if (i == text.size() || (text[i] == ',' && depth == 0)) {
      const std::string part = trimmed(text.substr(begin, i - begin));
      if (!part.empty()) parts.push_back(part);
      begin = i + 1;
    }
  }
  return parts;
}

uint32_t bytes_of_type(const std::string& type) {  // .u32, .bf16x2, .pred
  size_t digits = type.find_first_of("0123456789");
  if (digits == std::string::npos) return 0;
  const uint32_t bits = static_cast<uint32_t>(std::stoul(type.substr(digits)));
  return bits / 8 * (type.size() > 2 && type.substr(type.size() - 2) == "x2" ? 2 : 1);
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {
    size_t begin = 0;
    for (size_t i = 0; i <= text.size(); ++i)
      if (i == text.size() || text[i] == '\n') module_->text.push_back(text.substr(begin, i - begin)), begin = i + 1;
  }

  std::unique_ptr<Module> parse() {
    while (skip_space()) statement();
    if (kernel_) fail("a kernel has no end");
    for (auto& [kernel, sources] : sources_)
      for (const Source& s : sources) {
        const auto name = [&](int file, int line) {
          const auto found = files_.find(file);
          return (found == files_.end() ? "?" : found->second) + ":" + std::to_string(line);
        };
        const std::string inlined = s.inlined_file ? ", inlined at " + name(s.inlined_file, s.inlined_line) : "";
        kernel->places.push_back({0, s.file ? name(s.file, s.line) + inlined : ""});
      }
    return std::move(module_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    const size_t line = static_cast<size_t>(line_at_start_);
    throw ParseError("line " + std::to_string(line) + ": " + what + ": " +
                     (line - 1 < module_->text.size() ? trimmed(module_->text[line - 1]) : ""));
  }

  bool skip_space() {
    for (;; ++at_) {
      if (text_.compare(at_, 2, "//") == 0) at_ = std::min(text_.find('\n', at_), text_.size());
      if (text_.compare(at_, 2, "/*") == 0)
        for (at_ += 2; at_ < text_.size() && text_.compare(at_ - 2, 2, "*/") != 0; ++at_) line_ += text_[at_] == '\n';
      if (at_ >= text_.size() || text_[at_] == '\0') return false;
      if (text_[at_] == '\n') ++line_;
      if (!std::isspace(static_cast<unsigned char>(text_[at_]))) break;
    }
    line_at_start_ = line_;
    return true;
  }

  // The text up to one of the ends, without comments; the end itself is passed.
  std::string until(const std::string& ends) {
    std::string result;
    bool quoted = false;
    for (; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      quoted ^= c == '"';
      if (!quoted && ends.find(c) != std::string::npos) break;
      if (!quoted && text_.compare(at_, 2, "//") == 0) {
        at_ = std::min(text_.find('\n', at_), text_.size()) - 1;
        continue;
      }
      if (c == '\n') ++line_;
      result += c;
    }
    if (at_ < text_.size() && text_[at_] != '\n') ++at_;
    return result;
  }

  void statement() {
    const char c = text_[at_];
    if (c == '{') {
      ++at_;
      scopes_.emplace_back();
    } else if (c == '}') {
      ++at_;
      if (scopes_.empty()) fail("a bracket too many");
      scopes_.pop_back();
      if (scopes_.empty() && kernel_) end_kernel();
    } else if (c == ';') {
      ++at_;
    } else if (c == '.') {
      directive();
    } else {
      instruction_or_label();
    }
  }

  void directive() {
    size_t end = at_;
    while (end < text_.size() && is_word(text_[end])) ++end;
    const std::string word = text_.substr(at_, end - at_);
    if (word == ".version" || word == ".address_size" || word == ".maxntid" || word == ".minnctapersm") {
      until("\n");
    } else if (word == ".target") {
      module_->target = words(until("\n")).at(1);
    } else if (word == ".file") {
      const std::string line = until("\n");
      const size_t quote = line.find('"');
      const std::string path = line.substr(quote + 1, line.find('"', quote + 1) - quote - 1);
      files_[std::stoi(words(line).at(1))] = path;
    } else if (word == ".loc") {
      const std::vector<std::string> w = words(until("\n"));
      source_ = {std::stoi(w.at(1)), std::stoi(w.at(2)), 0, 0};
      for (size_t i = 3; i + 2 < w.size(); ++i)
        if (w[i] == "inlined_at")
          source_.inlined_file = std::stoi(w[i + 1]), source_.inlined_line = std::stoi(w[i + 2]);
    } else if (word == ".pragma") {
      const std::string pragma = until(";");
      const size_t mask = pragma.find("used_bytes_mask ");
      if (mask != std::string::npos) used_bytes_ = std::stoull(pragma.substr(mask + 16), nullptr, 0);
    } else if (word == ".section") {
      until("{");
      for (int depth = 1; depth > 0 && at_ < text_.size(); ++at_) {
        depth += (text_[at_] == '{') - (text_[at_] == '}');
        line_ += text_[at_] == '\n';
      }
    } else if (word == ".reg") {
      declare_registers(until(";"));
    } else if (word == ".shared" || (word == ".extern" && text_.compare(at_, 15, ".extern .shared") == 0)) {
      declare_shared(until(";"));
    } else if (word == ".global") {
      until(";");  // libdevice leaves strings behind; an instruction that named one would be an error
    } else if (word == ".entry" || word == ".visible" || word == ".weak") {
      start_kernel();
    } else {
      fail("an unknown directive");
    }
  }

  void start_kernel() {
    const std::string header = until("{");
    const size_t entry = header.find(".entry"), open = header.find('(', entry), close = header.rfind(')');
    if (entry == std::string::npos) fail("an unknown directive");
    auto kernel = std::make_unique<Kernel>();
    const bool takes_any = open != std::string::npos;
    const size_t name_end = takes_any ? open : header.size();
    kernel->name = words(header.substr(entry + 6, name_end - entry - 6)).at(0);
    kernel_ = kernel.get();
    sources_.emplace_back(kernel_, std::vector<Source>());
    source_ = {};
    scopes_.emplace_back();
    symbols_ = globals_;
    if (takes_any)
      for (const std::string& parameter : split(header.substr(open + 1, close - open - 1)))
        declare_parameter(parameter);
    const size_t required = header.find(".reqntid");
    if (required != std::string::npos) kernel_->required_threads = std::stoi(words(header.substr(required + 8)).at(0));
    module_->kernels[kernel->name] = std::move(kernel);
  }

  void declare_parameter(const std::string& declaration) {  // .param .align 8 .b8 name[200]
    uint32_t align = 0, size = 0;
    std::string name;
    const std::vector<std::string> w = words(declaration);
    for (size_t i = 1; i < w.size(); ++i) {
      if (w[i] == ".align") {
        if (!size) align = static_cast<uint32_t>(std::stoul(w[i + 1]));  // behind the type it is the pointer's
        ++i;
      } else if (w[i] == ".ptr" || w[i] == ".global" || w[i] == ".shared") {
        continue;
      } else if (w[i][0] == '.') {
        size = bytes_of_type(w[i]);
      } else {
        name = w[i];
      }
    }
    if (size == 0 || name.empty()) fail("an unknown parameter");
    align = std::max(align, size);
    const size_t bracket = name.find('[');
    if (bracket != std::string::npos) {
      align = std::max(1u, align);
      size *= static_cast<uint32_t>(std::stoul(name.substr(bracket + 1)));
      name = name.substr(0, bracket);
    }
    const uint32_t offset = (kernel_->parameter_bytes + align - 1) / align * align;
    kernel_->parameters.push_back({offset, size});
    kernel_->parameter_bytes = offset + size;
    symbols_[name] = offset;
  }

  // Static buffers lie one behind the other; all dynamic ones begin behind them.
  void declare_shared(const std::string& declaration) {
    const std::vector<std::string> w = words(declaration);
    const std::string name = w.back().substr(0, w.back().find('['));
    const size_t bracket = w.back().find('[');
    const bool dynamic = bracket != std::string::npos && w.back()[bracket + 1] == ']';
    if (w[0] == ".extern" && dynamic) {
      dynamic_.insert(name);
      (kernel_ ? symbols_ : globals_)[name] = kernel_ ? kernel_->dynamic_shared() : 0;
      return;
    }
    if (!kernel_) fail("expected shared memory to be declared inside a kernel, or as .extern");
    uint32_t align = 16, size = 0;
    for (const std::string& word : w)
      if (word[0] == '.' && bytes_of_type(word)) size = bytes_of_type(word);
    if (bracket != std::string::npos) size *= static_cast<uint32_t>(std::stoul(w.back().substr(bracket + 1)));
    const uint32_t offset = (kernel_->static_shared + align - 1) / align * align;
    symbols_[name] = offset;
    kernel_->static_shared = offset + size;
    for (const std::string& other : dynamic_) symbols_[other] = kernel_->dynamic_shared();
    if (!kernel_->code.empty()) fail("shared memory declared behind an instruction");
  }

  void declare_registers(const std::string& declaration) {  // .reg .b32 %r<65>, or .reg .pred p, q
    const std::vector<std::string> w = words(declaration);
    for (size_t i = 2; i < w.size(); ++i) {
      const size_t bracket = w[i].find('<');
      const std::string name = w[i].substr(0, bracket);
      const int count = bracket == std::string::npos ? 1 : std::stoi(w[i].substr(bracket + 1));
      scopes_.back()[bracket == std::string::npos ? name : name + "<"] = kernel_->registers;
      kernel_->registers += count;
    }
  }

  int constant(uint64_t value) {
    const auto [found, fresh] = constants_.try_emplace(value, ~static_cast<int>(constants_.size()));
    if (fresh) kernel_->constants.insert(kernel_->constants.end(), LANES, value);
    return found->second;
  }

  int register_named(const std::string& name) {
    size_t digits = name.size();
    while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
      if (digits < name.size())
        if (const auto found = scope->find(name.substr(0, digits) + "<"); found != scope->end())
          return found->second + std::stoi(name.substr(digits));
    }
    static const std::set<std::string> SPECIAL = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                                  "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                                  "%nctaid.y", "%nctaid.z", "%laneid",  "%warpid"};
    if (SPECIAL.count(name)) {
      scopes_.front()[name] = kernel_->registers;
      kernel_->special.emplace_back(kernel_->registers, name);
      return kernel_->registers++;
    }
    if (name == "_") return scopes_.front()["_"] = kernel_->registers++;
    fail("an unknown register " + name);
  }

  int operand(const std::string& text) {
    if (text.compare(0, 2, "0f") == 0 || text.compare(0, 2, "0d") == 0)
      return constant(std::stoull(text.substr(2), nullptr, 16));
    if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-')
      return constant(text[0] == '-' ? static_cast<uint64_t>(std::stoll(text, nullptr, 0))
                                     : std::stoull(text, nullptr, 0));
    if (const auto found = symbols_.find(text); found != symbols_.end()) return constant(found->second);
    return register_named(text);
  }

  void instruction_or_label() {
    size_t end = at_;
    while (end < text_.size() && is_word(text_[end])) ++end;
    if (text_[at_] != '@' && text_[end] == ':' && text_[end + 1] != ':') {
      labels_[text_.substr(at_, end - at_)] = static_cast<int>(kernel_ ? kernel_->code.size() : 0);
      at_ = end + 1;
      return;
    }
    const int line = line_;
    std::string text = trimmed(until(";"));
    if (!kernel_) fail("an instruction outside of a kernel");
    Instruction instruction;
    if (text[0] == '@') {
      instruction.guarded = true, instruction.negated = text[1] == '!';
      const size_t space = text.find_first_of(" \t\n");
      instruction.guard = register_named(text.substr(1 + instruction.negated, space - 1 - instruction.negated));
      text = trimmed(text.substr(space));
    }
    const size_t space = std::min(text.find_first_of(" \t\n{["), text.size());
    std::string opcode = text.substr(0, space);
    const std::vector<std::string> parts = split(text.substr(space));
    if (opcode == "bra" || opcode == "bra.uni") {
      branches_.emplace_back(kernel_->code.size(), parts.at(0));
    } else {
      opcode += decode_operands(opcode, parts, instruction);
    }
    decode_memory(opcode, instruction);
    instruction.form = find_form(opcode);
    if (!instruction.form) fail("an unknown form, " + opcode);
    if (instruction.form->operands >= 0 && instruction.form->operands != static_cast<int>(instruction.operands.size()))
      fail("expected " + std::to_string(instruction.form->operands) + " operands, got " +
           std::to_string(instruction.operands.size()));
    if (instruction.form->kind == Kind::block_barrier && (parts.size() != 1 || parts[0] != "0"))
      fail("only the barrier 0 of the whole block is known");
    const auto [known, fresh] = opcodes_.try_emplace(opcode, static_cast<int>(kernel_->opcodes.size()));
    if (fresh) kernel_->opcodes.push_back(opcode);
    instruction.opcode = known->second;
    std::vector<Source>& sources = sources_.back().second;
    if (sources.empty() || std::memcmp(&sources.back(), &source_, sizeof source_) != 0) sources.push_back(source_);
    instruction.place = static_cast<int>(sources.size()) - 1;
    kernel_->lines.push_back(line);
    kernel_->code.push_back(std::move(instruction));
  }

  // The operands in a row, vectors taken apart. Returns what tells apart forms of one opcode: packing and unpacking
  // moves, shuffles with a predicate.
  std::string decode_operands(const std::string& opcode, const std::vector<std::string>& parts,
                              Instruction& instruction) {
    std::string variant;
    bool has_address = false;
    for (size_t i = 0; i < parts.size(); ++i) {
      std::string part = parts[i];
      if (part[0] == '{') {
        const std::vector<std::string> elements = split(part.substr(1, part.rfind('}') - 1));
        for (const std::string& element : elements) instruction.operands.push_back(operand(element));
        if (opcode.compare(0, 4, "mov.") == 0)
          variant = (i == 0 ? ".unpack" : ".pack") + std::to_string(elements.size());
      } else if (part[0] == '[') {
        part = trimmed(part.substr(1, part.rfind(']') - 1));
        const size_t plus = part.find('+');
        instruction.operands.push_back(operand(trimmed(part.substr(0, plus))));
        const int64_t offset = plus == std::string::npos ? 0 : std::stoll(trimmed(part.substr(plus + 1)), nullptr, 0);
        (has_address ? instruction.second_offset : instruction.offset) = offset;
        has_address = true;
      } else if (const size_t bar = part.find('|'); bar != std::string::npos) {
        instruction.operands.push_back(operand(trimmed(part.substr(0, bar))));
        instruction.operands.push_back(operand(trimmed(part.substr(bar + 1))));
        variant = "|p";
      } else {
        instruction.operands.push_back(operand(part));
      }
    }
    return variant;
  }

  void decode_memory(const std::string& opcode, Instruction& instruction) {
    const bool load = opcode.compare(0, 3, "ld.") == 0;
    const auto is = [&](const char* name) { return opcode.rfind(name, 0) == 0; };
    if (!load && !is("st.") && !is("atom.") && !is("red.")) return;
    instruction.width = bytes_of_type(opcode.substr(opcode.rfind('.')));
    const size_t vector = opcode.find(".v");
    if (vector != std::string::npos) instruction.count = static_cast<uint32_t>(opcode[vector + 2] - '0');
    if (load && instruction.operands.size() != instruction.count + 1) fail("a vector of another length");
    if (load) instruction.used_bytes = used_bytes_, used_bytes_ = ~0ull;
  }

  void end_kernel() {
    for (const auto& [place, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) fail("an unknown label " + label);
      kernel_->code[place].target = found->second;
    }
    if (kernel_->code.empty()) fail("a kernel without instructions");
    branches_.clear(), labels_.clear(), constants_.clear(), opcodes_.clear();
    kernel_ = nullptr;
  }

  const std::string& text_;
  std::unique_ptr<Module> module_ = std::make_unique<Module>();
  size_t at_ = 0;
  int line_ = 1, line_at_start_ = 1;
  Kernel* kernel_ = nullptr;
  Source source_{};
  uint64_t used_bytes_ = ~0ull;
  std::map<int, std::string> files_;
  std::map<std::string, uint64_t> globals_, symbols_;  // addresses of shared buffers and parameters
  std::set<std::string> dynamic_;
  std::vector<std::map<std::string, int>> scopes_;  // registers; "%r<" holds the first of a numbered range
  std::map<uint64_t, int> constants_;
  std::map<std::string, int> opcodes_, labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
  std::vector<std::pair<Kernel*, std::vector<Source>>> sources_;
};

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) { return Parser(text).parse(); }

}  // namespace ptx
