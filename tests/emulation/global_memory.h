// The buffers that a test has announced as global memory, and what the race check knows of each byte of them.
#pragma once
#include <vector>

#include "memory_check.h"

namespace sparseops_emulation::memory {

// "Thread `thread` did this at its own time `clock`." Time 0 is never.
struct Epoch {
  const void* site = nullptr;
  std::uint32_t clock = 0;
  std::uint32_t block = 0;   // the first of those that ran together
  std::uint16_t thread = 0;  // of them all; those past the last are units of the hardware beside them
  bool atomic = false;
  bool by_task = false;  // of such a unit
};

// A read by another block than that of `read` is kept too: most buffers are only read, by all blocks in turn.
struct GlobalByte {
  Epoch write, read, read_elsewhere;
};

struct GlobalBuffer {
  Range range;
  std::vector<GlobalByte> shadow;  // empty until a launch touches the buffer
};

GlobalBuffer* find_global(const void* address);
void for_each_global(void (*f)(GlobalBuffer&));

}  // namespace sparseops_emulation::memory
