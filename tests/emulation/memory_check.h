// What the emulator tells the memory checker; nothing happens where the checker is not compiled in.
//
// In the race build (EMU_CHECK_MEMORY) kernels are compiled with -fsanitize=thread, but linked with memory_hooks.cpp in
// place of the ThreadSanitizer's library. So the compiler calls us for every load and store of an unmodified kernel.
// From that stream memory_check.cpp finds data races, and traffic.cpp counts what each request costs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#if defined(EMU_CHECK_MEMORY)
#include "clock.h"
#endif

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

// The shared memory of what runs at one time: the dynamic part of each block of a cluster, and the __shared__ variables
// of all kernels, of which there is one copy.
struct SharedMemory {
  std::vector<Range> dynamic;
  Range variables;
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
// As many blocks as `shared` has dynamic parts, from `number` on, of that many threads each. A thread's number counts
// from the first block's first thread.
void begin_blocks(unsigned number, unsigned threads, const SharedMemory& shared);
void end_blocks();
void running(unsigned thread);

// These threads have met: each now knows what all of them did.
void met(std::span<const unsigned> threads);
void met(unsigned first_thread, std::uint32_t lanes);  // those of a warp, named by a mask
// Blocks know of each other through a released and then acquired address alone.
void release(const void* address);
void acquire(const void* address);
// __threadfence: what relaxed atomics pass on is what their thread knew at its last fence, and is known after the next.
void fence();
void relaxed_atomic(const void* address);

// ---- what one hands on to others: by an mbarrier, or by an instruction to hardware beside the threads

void release(SyncClock& clock);        // the running thread adds what it did and knows; an engine, what its task did
void acquire(const SyncClock& clock);  // the running thread learns it
void join(SyncClock& to, const SyncClock& from);
// fence.proxy.async.shared::cta: what the running thread did and knows of counts, for tasks, from now on.
void fence_proxy_async();

// ---- hardware beside the threads: the copy engine, the tensor cores
//
// A unit of it is like a further thread. What it does comes in tasks, each of which knows what its start clock says,
// and of other tasks no more than that says. It accesses memory by the async proxy: of what a thread wrote it sees what
// a fence_proxy_async lies behind, and of global memory what earlier launches wrote.

unsigned add_unit(const char* name, unsigned number);  // "wgmma of warpgroup 2"; until the blocks end

struct Task {
  unsigned unit;
  std::uint32_t time;  // of the unit
  SyncClock start;
};
Task begin_task(unsigned unit, SyncClock start);  // what start holds is what those who issued the task released
Task begin_task(unsigned unit);                   // issued by the running thread

// While it lives, what is checked (check, begin_copy, end_copy) and released is of this task, which may act often. Who
// waits for it acquires what it released behind its last access.
class Engine {
 public:
  explicit Engine(const Task& task);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
};

// ---- accesses

void check(const void* address, std::size_t bytes, Access access, const void* site);  // for races
// A copy's destination, from its issue until it has landed: nobody may touch it.
void begin_copy(const void* address, std::size_t bytes, const void* site);
void end_copy(const void* address, std::size_t bytes, const void* site);
// An object that instructions of its own use, from its initialisation on, and nothing else: an mbarrier.
void begin_object(const void* address, std::size_t bytes, const void* site);
void use_object(const void* address, const void* site);  // must be ordered after the initialisation
void count(const void* address, std::size_t bytes, Access access, const void* site);  // as traffic
// As the compiler calls it: both, unless the address is none of the kernel's.
void on_access(const void* address, std::size_t bytes, Access access, const void* site);

std::string take_races();  // what went wrong since the last call; empty if nothing
std::vector<Traffic> take_traffic();

#else

inline constexpr bool kChecked = false;

struct SyncClock {};
struct Task {
  SyncClock start;
};
struct Engine {
  explicit Engine(const Task&) {}
  ~Engine() {}
};

inline void begin_launch() {}
inline void begin_blocks(unsigned, unsigned, const SharedMemory&) {}
inline void end_blocks() {}
inline void running(unsigned) {}
inline void met(std::span<const unsigned>) {}
inline void met(unsigned, std::uint32_t) {}
inline void release(const void*) {}
inline void acquire(const void*) {}
inline void fence() {}
inline void relaxed_atomic(const void*) {}
inline void release(SyncClock&) {}
inline void acquire(const SyncClock&) {}
inline void join(SyncClock&, const SyncClock&) {}
inline void fence_proxy_async() {}
inline unsigned add_unit(const char*, unsigned) { return 0; }
inline Task begin_task(unsigned, SyncClock = {}) { return {}; }
inline void check(const void*, std::size_t, Access, const void*) {}
inline void begin_copy(const void*, std::size_t, const void*) {}
inline void end_copy(const void*, std::size_t, const void*) {}
inline void begin_object(const void*, std::size_t, const void*) {}
inline void use_object(const void*, const void*) {}
inline void count(const void*, std::size_t, Access, const void*) {}
inline std::string take_races() { return {}; }
inline std::vector<Traffic> take_traffic() { return {}; }

#endif

}  // namespace sparseops_emulation::memory
