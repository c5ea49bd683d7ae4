// mbarriers: PTX ISA 9.7.13.15. The 8 bytes in shared memory only mark the place; what they would hold is kept here.
#include "mbarrier.h"

#include <cstring>
#include <map>

#include "block.h"
#include "ptx_sm90_emulation.h"
#include "shared_memory.h"

namespace sparseops_emulation {
namespace {

constexpr std::uint64_t kMark = 0xba221e2ba221e2ba;  // what the 8 bytes hold
constexpr std::int64_t kMost = (1 << 20) - 1;        // arrivals, and bytes either way

struct Mbarrier : Event {  // its generation is the number of phases that are over
  std::uint32_t address = 0;
  unsigned rank = 0;
  unsigned initialiser = 0;  // the thread's number
  bool fenced = false;       // since: known to the copy engine, and to the cluster after a barrier
  std::int64_t count = 0;    // arrivals that end a phase
  std::int64_t missing = 0;  // of them
  std::int64_t bytes = 0;    // announced and not come; below 0, come and not announced
  unsigned unit = 0;
  memory::SyncClock arriving, complete;

  void end_phase_if_complete() {
    if (missing != 0 || bytes != 0) return;
    missing = count;
    memory::join(complete, arriving);  // later phases come after earlier ones
    arriving = {};
    ++generation;
  }

  std::string describe() const override {
    char text[160];
    std::snprintf(text, sizeof text, "mbarrier 0x%x: phase %llu, %lld of %lld arrivals missing, %lld bytes", address,
                  static_cast<unsigned long long>(generation), static_cast<long long>(missing),
                  static_cast<long long>(count), static_cast<long long>(bytes));
    return text;
  }
};

struct Mbarriers {
  std::map<std::pair<unsigned, std::uint32_t>, Mbarrier> all;  // by rank and address
};

Mbarrier& find(std::uint32_t address, unsigned rank, const char* what) {
  Block& b = block();
  const std::byte* place = shared_pointer(address, 8, 8, what, rank);
  auto& all = b.state<Mbarriers>().all;
  const auto found = all.find({rank, address});
  if (found == all.end()) b.fail("%s: no mbarrier was initialised at 0x%x of block %u", what, address, rank);
  if (std::memcmp(place, &kMark, sizeof kMark) != 0)
    b.fail("%s: something has written over the mbarrier at 0x%x", what, address);
  return found->second;
}

// For the running thread.
Mbarrier& use(std::uint32_t address, unsigned rank, const char* what, const void* site) {
  Block& b = block();
  b.self().site = site;
  Mbarrier& bar = find(address, rank, what);
  memory::use_object(shared_pointer(address, 8, 8, what, rank), site);
  if (rank != b.self().rank && !bar.fenced)
    b.fail("%s: the mbarrier at 0x%x of block %u had no fence.mbarrier_init after its initialisation", what, address,
           rank);
  return bar;
}

void change_bytes(Mbarrier& bar, std::int64_t by, const char* what) {
  bar.bytes += by;
  if (bar.bytes > kMost || bar.bytes < -kMost)
    block().fail("%s: %lld bytes at the mbarrier at 0x%x, of at most 2^20 - 1", what, static_cast<long long>(bar.bytes),
                 bar.address);
}

void arrive(Mbarrier& bar, const char* what) {
  if (bar.missing == 0)
    block().fail(
        "%s: more arrivals at the mbarrier at 0x%x than the %lld it was initialised for (%lld bytes are "
        "missing)",
        what, bar.address, static_cast<long long>(bar.count), static_cast<long long>(bar.bytes));
  memory::release(bar.arriving);
  --bar.missing;
  bar.end_phase_if_complete();
}

}  // namespace

void mbarrier_init(std::uint32_t address, std::uint32_t arrivals) {
  constexpr const char* kWhat = "mbarrier.init";
  Block& b = block();
  const Thread& me = b.self();
  b.self().site = EMU_SITE;
  std::byte* place = shared_pointer(address, 8, 8, kWhat);
  if (arrivals == 0 || arrivals > kMost) b.fail("%s: %u arrivals, of 1 to 2^20 - 1", kWhat, arrivals);
  const auto [found, is_new] = b.state<Mbarriers>().all.try_emplace({me.rank, address});
  if (!is_new) b.fail("%s: the mbarrier at 0x%x is in use already", kWhat, address);
  memory::begin_object(place, 8, EMU_SITE);
  std::memcpy(place, &kMark, sizeof kMark);
  Mbarrier& bar = found->second;
  bar.address = address;
  bar.rank = me.rank;
  bar.initialiser = me.number;
  bar.count = bar.missing = arrivals;
  bar.unit = memory::add_unit("copies of an mbarrier", address);
}

void fence_mbarrier_init() {
  Block& b = block();
  b.self().site = EMU_SITE;
  for (auto& [_, bar] : b.state<Mbarriers>().all)
    if (bar.initialiser == b.self().number) bar.fenced = true;
}

void mbarrier_arrive(std::uint32_t address) {
  arrive(use(address, block().self().rank, "mbarrier.arrive", EMU_SITE), "mbarrier.arrive");
}

void mbarrier_arrive_expect_tx(std::uint32_t address, std::uint32_t bytes) {
  constexpr const char* kWhat = "mbarrier.arrive.expect_tx";
  Mbarrier& bar = use(address, block().self().rank, kWhat, EMU_SITE);
  change_bytes(bar, bytes, kWhat);
  arrive(bar, kWhat);
}

void mbarrier_arrive_cluster(std::uint32_t address, std::uint32_t rank) {
  constexpr const char* kWhat = "mbarrier.arrive.shared::cluster";
  arrive(use(address, rank, kWhat, EMU_SITE), kWhat);
}

void mbarrier_wait(std::uint32_t address, std::uint32_t parity) {
  constexpr const char* kWhat = "mbarrier.try_wait.parity";
  Block& b = block();
  const Mbarrier& bar = use(address, b.self().rank, kWhat, EMU_SITE);
  if (parity > 1) b.fail("%s: a parity of %u", kWhat, parity);
  while ((bar.generation & 1) == parity) b.wait(bar, kWhat, EMU_SITE);
  memory::acquire(bar.complete);
}

unsigned mbarrier_for_copy(std::uint32_t address, unsigned rank, const char* what) {
  Block& b = block();
  const Mbarrier& bar = use(address, rank, what, b.self().site);
  if (!bar.fenced)
    b.fail("%s: the mbarrier at 0x%x of block %u had no fence.mbarrier_init after its initialisation", what, address,
           rank);
  return bar.unit;
}

void mbarrier_complete_tx(std::uint32_t address, unsigned rank, std::uint32_t bytes) {
  constexpr const char* kWhat = "mbarrier.complete_tx";
  Mbarrier& bar = find(address, rank, kWhat);
  change_bytes(bar, -std::int64_t{bytes}, kWhat);
  memory::release(bar.arriving);
  bar.end_phase_if_complete();
}

void fence_proxy_async() { memory::fence_proxy_async(); }

}  // namespace sparseops_emulation
