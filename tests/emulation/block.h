// The running block: its threads as fibers, its barrier, its warps, its shared memory.
//
// A thread runs until it waits, then control moves to another that can go on. Blocks run one after another. All of it
// repeats exactly for one EMU_SEED: 0 runs blocks and threads in order of their numbers, any other seed shuffles both.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "memory_check.h"
#include "vector_types.h"

namespace sparseops_emulation {

// What a kernel did wrong, or cannot be emulated.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::uint64_t seed();  // EMU_SEED

// A cp.async on its way: it lands when its thread waits for it.
struct Copy {
  std::byte* destination;
  std::array<std::byte, 16> content;
  unsigned bytes;
  const void* site;
};

// Threads meet here; the last to arrive opens it for all.
struct Meeting {
  std::uint64_t generation = 0;
  unsigned arrived = 0, expected = 0;
};

// What each lane brings to a meeting of its warp; null for a lane that takes no part.
using Lanes = std::array<void*, 32>;

struct Warp {
  Meeting meeting;
  const char* operation = nullptr;
  std::uint32_t mask = 0;
  Lanes arguments{};
};

struct Thread {
  unsigned id = 0, lane = 0;
  uint3 index{};
  Warp* warp = nullptr;
  void* position = nullptr;       // of its stack, while another thread runs
  const Meeting* wait = nullptr;  // goes on once this meeting's generation is past `seen`
  std::uint64_t seen = 0;
  const char* operation = "";  // what it waits in
  const void* site = nullptr;  // the emulated instruction that it reached last
  bool done = false;
  std::vector<Copy> open_copies;              // issued
  std::deque<std::vector<Copy>> copy_groups;  // committed

  bool can_run() const { return !done && (!wait || wait->generation != seen); }
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory of exactly the asked size: AddressSanitizer sees its end.
std::unique_ptr<std::byte[], Free> allocate(std::size_t bytes, std::size_t alignment);

// A reference to a function of Lanes. Owns nothing, since what calls it may be abandoned.
class Combine {
 public:
  template <class F>
  Combine(const F& f)
      : function_(&f),
        call_([](const void* function, const Lanes& lanes) { (*static_cast<const F*>(function))(lanes); }) {}
  void operator()(const Lanes& lanes) const { call_(function_, lanes); }

 private:
  const void* function_;
  void (*call_)(const void*, const Lanes&);
};

class Block {
 public:
  Block(unsigned threads, std::size_t shared_bytes);

  void run(unsigned number, uint3 index, const std::function<void()>& kernel);  // throws Error

  // ---- for the running thread

  Thread& self() { return *self_; }
  void barrier(const char* operation, const void* site);
  int barrier_sum(const char* operation, int value, const void* site);  // of all threads' values

  // All lanes of `mask` meet. The last one runs `combine` on everybody's argument, then all go on. Orders no memory, as
  // on the device.
  void meet(const char* operation, std::uint32_t mask, void* argument, Combine combine, const void* site);

  // Ends the launch. Threads are left where they stand: kernels own nothing, and neither may the callers of this.
  [[noreturn, gnu::format(printf, 2, 3)]] void fail(const char* format, ...);

  unsigned size() const { return static_cast<unsigned>(threads_.size()); }
  std::byte* dynamic_shared() { return shared_.get(); }
  std::size_t shared_bytes() const { return shared_bytes_; }
  bool on_guard_page(const void* address) const;

 private:
  static void enter();
  void wait(const Meeting& meeting, const char* operation, const void* site);
  Thread* next();
  void go_on_with(Thread* thread);
  std::string describe_threads() const;
  std::string place() const;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Meeting barrier_;
  const char* barrier_operation_ = nullptr;
  int sum_ = 0, last_sum_ = 0;
  std::unique_ptr<std::byte[], Free> shared_;
  std::size_t shared_bytes_;
  bool shuffled_;
  std::mt19937_64 random_;
  Thread* self_ = nullptr;
  MainStack main_;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
};

// The block being run. Outside a kernel there is none, and asking for it is an Error.
Block& block();
bool in_kernel();

// The __shared__ variables of all kernels in this program; empty where they cannot be told from others.
memory::Range shared_variables();

// Bounds of what every launch may ask for, those of compute capability 8.0.
inline constexpr std::size_t kMaxSharedBytes = 163 * 1024;
inline constexpr unsigned kMaxThreads = 1024;

}  // namespace sparseops_emulation
