// Work that hardware beside the threads does: copies, multiplications.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>

namespace sparseops_emulation {

struct Work {
  const char* what;  // "TMA load"
  const void* site;  // of the instruction that began it
  unsigned rank;     // of the block whose shared memory it touches: that block must not end before it is done
  std::function<void()> run;
  bool may_outlive = false;  // its block: then it is done at the end of the cluster
  std::uint64_t id = 0;
};

}  // namespace sparseops_emulation
