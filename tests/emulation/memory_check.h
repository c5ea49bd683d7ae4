// What the emulator tells the memory checker; nothing happens where the checker is not compiled in.
//
// In the race build (EMU_CHECK_MEMORY) kernels are compiled with -fsanitize=thread, but linked with memory_hooks.cpp in
// place of the ThreadSanitizer's library. So the compiler calls us for every load and store of an unmodified kernel.
// From that stream memory_check.cpp finds data races, and traffic.cpp counts what each request costs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sparseops_emulation::memory {

// ---- global memory, known in all builds

void watch_global(const void* address, std::size_t bytes);
void forget_global(const void* address);
// Whether [address, address + bytes) lies within one watched buffer, or nothing is watched at all.
bool is_global(const void* address, std::size_t bytes);

struct Range {
  const std::byte* begin = nullptr;
  const std::byte* end = nullptr;

  bool holds(const void* address, std::size_t bytes) const {
    const auto a = static_cast<const std::byte*>(address);
    return a >= begin && a + bytes <= end;
  }
};

// A block's shared memory: the dynamic part, and the __shared__ variables of all kernels.
struct SharedMemory {
  Range dynamic, variables;
};

enum class Access { read, read_only, write, atomic };  // read_only: by the path that sees no writes of this launch

// One line of a kernel that loads or stores, and what it cost: shared memory in passes over the 32 banks, global memory
// in sectors of 32 bytes. `ideal` is the least that could hold the bytes asked for.
struct Traffic {
  std::string place;  // as describe() writes it
  bool shared = false;
  bool store = false;
  std::size_t bytes = 0;  // of one thread's access
  std::uint64_t requests = 0, units = 0, ideal = 0;
};

#if defined(EMU_CHECK_MEMORY)

inline constexpr bool kChecked = true;

void begin_launch();
void begin_block(unsigned number, unsigned threads, const SharedMemory& shared);
void end_block();
void running(unsigned thread);

// The threads of the block, or those of a warp named by a mask, have met: each now knows what all of them did.
void met();
void met(unsigned first_thread, std::uint32_t lanes);
// Blocks know of each other through a released and then acquired address alone.
void release(const void* address);
void acquire(const void* address);
// __threadfence: what relaxed atomics pass on is what their thread knew at its last fence, and is known after the next.
void fence();
void relaxed_atomic(const void* address);

void check(const void* address, std::size_t bytes, Access access, const void* site);  // for races
// A cp.async's destination, from its issue to its thread's wait: nobody may touch it.
void begin_copy(const void* address, std::size_t bytes, const void* site);
void end_copy(const void* address, std::size_t bytes, const void* site);
void count(const void* address, std::size_t bytes, Access access, const void* site);  // as traffic
// As the compiler calls it: both, unless the address is none of the kernel's.
void on_access(const void* address, std::size_t bytes, Access access, const void* site);

std::string take_races();  // what went wrong since the last call; empty if nothing
std::vector<Traffic> take_traffic();

#else

inline constexpr bool kChecked = false;

inline void begin_launch() {}
inline void begin_block(unsigned, unsigned, const SharedMemory&) {}
inline void end_block() {}
inline void running(unsigned) {}
inline void met() {}
inline void met(unsigned, std::uint32_t) {}
inline void release(const void*) {}
inline void acquire(const void*) {}
inline void fence() {}
inline void relaxed_atomic(const void*) {}
inline void check(const void*, std::size_t, Access, const void*) {}
inline void begin_copy(const void*, std::size_t, const void*) {}
inline void end_copy(const void*, std::size_t, const void*) {}
inline void count(const void*, std::size_t, Access, const void*) {}
inline std::string take_races() { return {}; }
inline std::vector<Traffic> take_traffic() { return {}; }

#endif

}  // namespace sparseops_emulation::memory
