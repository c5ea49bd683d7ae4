// Code addresses as lines of source.
#pragma once
#include <string>
#include <vector>

namespace sparseops_emulation {

// "load_stage (mainloop.cuh:120) < run (mainloop.cuh:88)" for a return address: the innermost function first, then
// those it was inlined into. Asks binutils' addr2line, once for each address.
std::string describe(const void* site);

// Asks for many at once, which is as quick as asking for one.
void look_up(const std::vector<const void*>& sites);

}  // namespace sparseops_emulation
