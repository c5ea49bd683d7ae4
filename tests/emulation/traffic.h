// Counts what loads and stores cost. See memory_check.h.
#pragma once
#include "memory_check.h"

namespace sparseops_emulation::memory {

void begin_traffic(unsigned threads, const SharedMemory& shared);
void traffic_of(unsigned thread);  // from here on
void end_traffic();

}  // namespace sparseops_emulation::memory
