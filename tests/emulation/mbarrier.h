// What copies in the background need of mbarriers. The instructions themselves: ptx_sm90_emulation.h.
#pragma once
#include <cstdint>

namespace sparseops_emulation {

// At the issue of a copy that will count at mbarrier `bar` of block `rank`: fails unless it is initialised, that is
// known to the running thread, and fence_mbarrier_init has made it known to the copy engine. Returns the unit of the
// race check (memory::begin_task) that the copies of this mbarrier run on.
unsigned mbarrier_for_copy(std::uint32_t bar, unsigned rank, const char* what);

// complete_tx, from work in the background. Call it within the work's memory::Engine, after all its accesses: who waits
// for the phase then knows of them.
void mbarrier_complete_tx(std::uint32_t bar, unsigned rank, std::uint32_t bytes);

}  // namespace sparseops_emulation
