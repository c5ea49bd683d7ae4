#include "source_lines.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>

namespace sparseops_emulation {
namespace {

std::map<const void*, std::string>& known() {
  static std::map<const void*, std::string> places;
  return places;
}

// "void sparseops::(anonymous namespace)::f<3, T>(int)" -> "f"
std::string plain_name(const std::string& demangled) {
  std::string name;
  int depth = 0;
  for (std::size_t i = 0; i < demangled.size(); ++i) {
    const char c = demangled[i];
    if (demangled.compare(i, 9, "(anonymou") == 0) {
      i = demangled.find(')', i);
      if (i == std::string::npos) break;
      continue;
    }
    if (c == '(' && depth == 0) break;
    depth += c == '<' ? 1 : c == '>' ? -1 : 0;
    if (depth > 0 || c == '>') continue;
    if (c == ':' || c == ' ') {
      name.clear();
    } else {
      name += c;
    }
  }
  return name.empty() ? demangled : name;
}

void look_up_in(const char* file, const char* base, const std::vector<const void*>& sites) {
  std::string command = std::string("addr2line -Caifs -e '") + file + "'";
  for (const void* site : sites) {
    char text[32];
    // one byte back: a return address may belong to the next line already
    std::snprintf(text, sizeof text, " 0x%tx", static_cast<const char*>(site) - base - 1);
    command += text;
  }
  command += " 2>/dev/null";
  std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  if (!pipe) return;
  std::size_t next = 0;
  std::string* place = nullptr;
  std::string function;
  char line[4096];
  while (std::fgets(line, sizeof line, pipe.get())) {
    line[std::strcspn(line, "\n")] = 0;
    if (std::strncmp(line, "0x", 2) == 0) {  // -a: the address comes first, then pairs of function and line
      place = next < sites.size() ? &known()[sites[next++]] : nullptr;
      if (place) place->clear();
      function.clear();
    } else if (place && function.empty()) {
      function = plain_name(line);
    } else if (place) {
      line[std::strcspn(line, " ")] = 0;  // " (discriminator 2)"
      *place += (place->empty() ? "" : " < ") + function + " (" + line + ")";
      function.clear();
    }
  }
}

}  // namespace

void look_up(const std::vector<const void*>& sites) {
  std::map<std::pair<const char*, const char*>, std::vector<const void*>> by_module;
  for (const void* site : sites) {
    Dl_info module{};
    if (!site || !known().emplace(site, "?").second) continue;
    if (dladdr(site, &module) && module.dli_fname)
      by_module[{module.dli_fname, static_cast<const char*>(module.dli_fbase)}].push_back(site);
  }
  for (const auto& [module, of_module] : by_module) {
    constexpr std::size_t kAtOnce = 500;  // a command line is limited
    for (std::size_t i = 0; i < of_module.size(); i += kAtOnce)
      look_up_in(module.first, module.second,
                 {of_module.begin() + i, of_module.begin() + std::min(i + kAtOnce, of_module.size())});
  }
}

std::string describe(const void* site) {
  look_up({site});
  return site ? known()[site] : "?";
}

}  // namespace sparseops_emulation
