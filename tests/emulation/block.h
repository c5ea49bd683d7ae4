// What runs at one time: a block, or all blocks of a cluster. Their threads are fibers.
//
// A thread runs until it waits, then control moves to another that can go on, of whichever block. What hardware does
// beside the threads is put off until no thread can go on. Blocks, or clusters of them, run one after another. All of
// it repeats exactly for one EMU_SEED: 0 runs blocks and threads in order of their numbers and background work as late
// as possible; any other seed shuffles both, and does background work earlier now and then.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "background.h"
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

// What threads wait for: until its generation has changed.
struct Event {
  std::uint64_t generation = 0;

  virtual ~Event() = default;
  virtual std::string describe() const { return {}; }  // how far it is, for the report of a deadlock
};

// Threads meet here; the last to arrive opens it for all.
struct Meeting : Event {
  unsigned arrived = 0, expected = 0;
};

// What each thread brings to a meeting of its warp, or warpgroup; null for one that takes no part.
using Lanes = std::array<void*, 32>;
using WarpgroupLanes = std::array<void*, 128>;

template <class Arguments>
struct Collective {
  Meeting meeting;
  const char* operation = nullptr;
  std::uint32_t mask = 0;
  Arguments arguments{};
};
using Warp = Collective<Lanes>;
using Warpgroup = Collective<WarpgroupLanes>;

struct Thread {
  unsigned number = 0;  // within the cluster: of its block's first thread, and `id`
  unsigned rank = 0, id = 0, lane = 0;
  uint3 index{};
  void* position = nullptr;     // of its stack, while another thread runs
  const Event* wait = nullptr;  // goes on once this event's generation is past `seen`
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
template <class Arguments>
class Combine {
 public:
  template <class F>
  Combine(const F& f)
      : function_(&f),
        call_([](const void* function, const Arguments& lanes) { (*static_cast<const F*>(function))(lanes); }) {}
  void operator()(const Arguments& lanes) const { call_(function_, lanes); }

 private:
  const void* function_;
  void (*call_)(const void*, const Arguments&);
};

template <class T>
inline constexpr char kKeyOf = 0;  // its address stands for T

class Block {
 public:
  // `cluster` blocks of that many threads and bytes each
  Block(unsigned threads, std::size_t shared_bytes, unsigned cluster = 1);

  // Runs the blocks from `number` and `first` on, which are neighbours along x; throws Error.
  void run(unsigned number, uint3 first, const std::function<void()>& kernel);

  unsigned size() const { return size_; }  // threads of a block
  unsigned cluster() const { return static_cast<unsigned>(members_.size()); }
  std::size_t shared_bytes() const { return shared_bytes_; }
  std::byte* dynamic_shared(unsigned rank) { return members_[rank].shared.get(); }
  unsigned live(unsigned rank) const { return members_[rank].running; }  // threads that have not ended
  bool has_ended(unsigned rank) const { return live(rank) == 0; }
  bool on_guard_page(const void* address) const;

  // ---- for the running thread

  Thread& self() { return *self_; }
  std::byte* dynamic_shared() { return dynamic_shared(self_->rank); }
  void barrier(const char* operation, const void* site);
  int barrier_sum(const char* operation, int value, const void* site);     // of all threads' values
  void wait(const Event& event, const char* operation, const void* site);  // until its generation changes

  // All lanes of `mask` meet. The last one runs `combine` on everybody's argument, then all go on. Orders no memory, as
  // on the device.
  void meet(const char* operation, std::uint32_t mask, void* argument, Combine<Lanes> combine, const void* site);
  // The same for the 128 threads of a warpgroup: threads 128i to 128i + 127 of a block.
  void meet_warpgroup(const char* operation, void* argument, Combine<WarpgroupLanes> combine, const void* site);

  // Ends the launch. Threads are left where they stand: kernels own nothing, and neither may the callers of this. Work
  // in the background may: there it throws.
  [[noreturn, gnu::format(printf, 2, 3)]] void fail(const char* format, ...);

  // ---- work in the background

  // Does it as late as possible, or, if the schedule is shuffled, some time before. Returns a number for finish().
  std::uint64_t in_background(Work work);
  void finish(std::uint64_t work);  // at once, unless it is done already

  // ---- what topics keep of the running blocks: made when first asked for, gone with them

  template <class T>
  T& state() {
    std::shared_ptr<void>& found = states_[&kKeyOf<T>];
    if (!found) found = std::make_shared<T>();
    return *static_cast<T*>(found.get());
  }
  // Asked of each thread that ends, in its name: may fail().
  void when_a_thread_ends(void (*check)(Thread&)) { end_checks_.push_back(check); }

 private:
  // One of the blocks.
  struct Member {
    uint3 index{};
    std::unique_ptr<std::byte[], Free> shared;
    unsigned running = 0;  // threads that have not ended
    Meeting barrier;
    const char* barrier_operation = nullptr;
    int sum = 0, last_sum = 0;
  };

  static void enter();
  void start(uint3 first);
  void end_thread();
  Thread* next();
  Thread* pick();
  void go_on_with(Thread* thread);
  void do_work(std::size_t position);
  std::string describe_threads() const;
  std::string place(unsigned rank) const;

  unsigned size_;
  std::size_t shared_bytes_;
  std::vector<Member> members_;
  std::vector<Thread> threads_;  // of the first block, then of the next
  std::vector<Warp> warps_;
  std::vector<Warpgroup> warpgroups_;
  std::deque<Work> background_;
  std::uint64_t works_ = 0;
  const Work* working_ = nullptr;
  std::map<const void*, std::shared_ptr<void>> states_;
  std::vector<void (*)(Thread&)> end_checks_;
  bool shuffled_;
  std::mt19937_64 random_;
  Thread* self_ = nullptr;
  MainStack main_;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
};

// What is being run. Outside a kernel there is none, and asking for it is an Error.
Block& block();
bool in_kernel();

// The __shared__ variables of all kernels in this program; empty where they cannot be told from others.
memory::Range shared_variables();

// Bounds of what every launch may ask for, those of compute capability 9.0.
inline constexpr std::size_t kMaxSharedBytes = 227 * 1024;
inline constexpr unsigned kMaxThreads = 1024;
inline constexpr unsigned kMaxCluster = 8;

}  // namespace sparseops_emulation
