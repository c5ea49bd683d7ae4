// What each thread of the running blocks, and each task of the hardware beside them, knows of what the others did. The
// race check asks it whether an access is over. Only in the race build.
#pragma once
#include <string>

#include "global_memory.h"

namespace sparseops_emulation::memory {

void begin_knowledge(unsigned block_number, unsigned threads, unsigned blocks);
void forget_releases();  // of a launch
void act_as(unsigned thread);

Epoch now(bool is_atomic, const void* site);

// Whether who acts knows that `e` is over. A task that reaches memory by the async proxy knows of a thread's write only
// by way of a fence_proxy_async; of a thread's read, without.
enum class Known { yes, no, without_fence };
Known known(const Epoch& write, bool is_shared);
bool is_known(const Epoch& read);
bool acts_as_task();

bool is_of_another_block(const Epoch& e);
std::string who(const Epoch& e);  // "thread 3 of block 1", "copies of an mbarrier 1024"

}  // namespace sparseops_emulation::memory
