// Where threads meet: the block's barrier, warps and warpgroups, named barriers, the cluster's barrier. See block.h and
// ptx_sm90_emulation.h.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "ptx_sm90_emulation.h"

namespace sparseops_emulation {

// ---- the block's barrier

void Block::barrier(const char* operation, const void* site) { barrier_sum(operation, 0, site); }

int Block::barrier_sum(const char* operation, int value, const void* site) {
  Member& member = members_[self_->rank];
  self_->site = site;
  if (member.barrier.arrived == 0) {
    member.barrier_operation = operation;
    member.sum = 0;
  } else if (std::strcmp(member.barrier_operation, operation) != 0) {
    fail("the block diverges: %s here, %s elsewhere", operation, member.barrier_operation);
  }
  member.sum += value;
  if (++member.barrier.arrived < size_) {
    wait(member.barrier, operation, site);
    return member.last_sum;
  }
  member.barrier.arrived = 0;
  ++member.barrier.generation;
  if (memory::kChecked) {
    std::vector<unsigned> all(size_);
    for (unsigned i = 0; i < size_; ++i) all[i] = self_->rank * size_ + i;
    memory::met(all);
  }
  return member.last_sum = member.sum;
}

// ---- warps and warpgroups

void Block::meet(const char* operation, std::uint32_t mask, void* argument, Combine<Lanes> combine, const void* site) {
  Thread& me = *self_;
  Warp& warp = warps_[me.number / 32];
  me.site = site;
  if (!(mask >> me.lane & 1)) fail("%s: the caller is not in its own mask", operation);
  if (warp.meeting.arrived == 0) {
    const unsigned lanes = std::min(32u, size_ - me.id / 32 * 32);
    if (lanes < 32 && mask >> lanes) fail("%s: the mask names lanes that do not exist", operation);
    warp.operation = operation;
    warp.mask = mask;
    warp.arguments = {};
    warp.meeting.expected = static_cast<unsigned>(__builtin_popcount(mask));
  } else if (std::strcmp(warp.operation, operation) != 0 || warp.mask != mask) {
    fail("the warp diverges: %s of 0x%08x here, %s of 0x%08x elsewhere", operation, mask, warp.operation, warp.mask);
  }
  warp.arguments[me.lane] = argument;
  if (++warp.meeting.arrived < warp.meeting.expected) return wait(warp.meeting, operation, site);
  combine(warp.arguments);
  warp.meeting.arrived = 0;
  ++warp.meeting.generation;
}

void Block::meet_warpgroup(const char* operation, void* argument, Combine<WarpgroupLanes> combine, const void* site) {
  constexpr unsigned kThreads = 128;
  Thread& me = *self_;
  me.site = site;
  const unsigned first = me.id / kThreads * kThreads;
  if (size_ - first < kThreads) fail("%s: fewer than 128 threads in this warpgroup", operation);
  Warpgroup& group = warpgroups_[me.rank * (size_ / kThreads) + me.id / kThreads];
  if (group.meeting.arrived == 0) {
    group.operation = operation;
  } else if (std::strcmp(group.operation, operation) != 0) {
    fail("the warpgroup diverges: %s here, %s elsewhere", operation, group.operation);
  }
  group.arguments[me.id % kThreads] = argument;
  if (++group.meeting.arrived < kThreads) return wait(group.meeting, operation, site);
  combine(group.arguments);
  group.meeting.arrived = 0;
  ++group.meeting.generation;
}

bool elect_one() {
  Block& b = block();
  char none;
  b.meet("elect.sync", ~0u, &none, [](const Lanes&) {}, EMU_SITE);
  return b.self().lane == 0;
}

// ---- named barriers: PTX ISA 9.7.13.1

namespace {

struct NamedBarrier : Meeting {
  std::vector<unsigned> warps;  // that have arrived, by the number of their first thread

  std::string describe() const override {
    return std::to_string(arrived) + " of " + std::to_string(expected) + " threads";
  }
};

struct NamedBarriers {
  static constexpr std::uint32_t kCount = 16;
  NamedBarrier of_rank[kMaxCluster][kCount];
};

// A whole warp comes to a barrier: it counts for 32 threads, whatever some of them do.
void arrive_as_warp(NamedBarrier& barrier, std::uint32_t id, std::uint32_t threads) {
  Block& b = block();
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.warps.clear();
  } else if (barrier.expected != threads) {
    b.fail("bar.sync %u: %u threads here, %u elsewhere", id, threads, barrier.expected);
  }
  barrier.warps.push_back(b.self().number / 32 * 32);
  barrier.arrived += 32;
  if (barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
  if (!memory::kChecked) return;
  std::vector<unsigned> all;
  for (const unsigned warp : barrier.warps)
    for (unsigned lane = 0; lane < 32; ++lane) all.push_back(warp + lane);
  memory::met(all);
}

}  // namespace

void named_barrier(std::uint32_t id, std::uint32_t threads) {
  const void* site = EMU_SITE;
  Block& b = block();
  b.self().site = site;
  if (id >= NamedBarriers::kCount) b.fail("bar.sync: barrier %u, of 0 to 15", id);
  if (threads == 0 || threads % 32 || threads > b.size())
    b.fail("bar.sync %u: %u threads, which are not whole warps of the block", id, threads);
  if (id == 0) {
    if (threads != b.size()) b.fail("bar.sync 0: %u threads, but barrier 0 is that of __syncthreads", threads);
    return b.barrier("__syncthreads", site);
  }
  NamedBarrier& barrier = b.state<NamedBarriers>().of_rank[b.self().rank][id];
  struct Lane {
    std::uint32_t id, threads;
    std::uint64_t generation;  // out: that the warp waits to see the end of
  } lane{id, threads, 0};
  b.meet(
      "bar.sync", ~0u, &lane,
      [&](const Lanes& lanes) {
        const std::uint64_t generation = barrier.generation;
        for (void* each : lanes) {
          auto& other = *static_cast<Lane*>(each);
          if (other.id != id || other.threads != threads)
            b.fail("the warp diverges: bar.sync %u, %u here, bar.sync %u, %u elsewhere", id, threads, other.id,
                   other.threads);
          other.generation = generation;
        }
        arrive_as_warp(barrier, id, threads);
      },
      site);
  if (barrier.generation == lane.generation) b.wait(barrier, "bar.sync", site);
}

// ---- the cluster's barrier: PTX ISA 9.7.13.4

namespace {

struct ClusterBarrier : Event {
  std::vector<bool> arrived;      // by thread: arrived, and has not waited since
  std::vector<std::uint64_t> at;  // the generation it arrived in
  unsigned running = 0;           // threads that have not ended
  unsigned missing = 0;           // of them, those that have not arrived in this generation
  memory::SyncClock arriving, complete;

  ClusterBarrier() {
    Block& b = block();
    for (unsigned rank = 0; rank < b.cluster(); ++rank) running += b.live(rank);
    missing = running;
    arrived.resize(b.cluster() * b.size());
    at.resize(arrived.size());
    b.when_a_thread_ends(&ClusterBarrier::end);
  }

  bool has_arrived(const Thread& thread) const { return arrived[thread.number] && at[thread.number] == generation; }

  static void end(Thread& thread) {
    auto& me = block().state<ClusterBarrier>();
    --me.running;
    if (!me.has_arrived(thread)) me.one_less();
  }

  void one_less() {
    if (--missing > 0) return;
    missing = running;
    complete = arriving;
    ++generation;
  }

  std::string describe() const override { return std::to_string(missing) + " threads have not arrived"; }
};

}  // namespace

std::uint32_t cluster_rank() { return block().self().rank; }

void cluster_arrive() {
  Block& b = block();
  Thread& me = b.self();
  me.site = EMU_SITE;
  auto& barrier = b.state<ClusterBarrier>();
  if (barrier.arrived[me.number]) b.fail("barrier.cluster.arrive: arrives again without a wait in between");
  barrier.arrived[me.number] = true;
  barrier.at[me.number] = barrier.generation;
  memory::release(barrier.arriving);
  barrier.one_less();
}

void cluster_wait() {
  Block& b = block();
  Thread& me = b.self();
  me.site = EMU_SITE;
  auto& barrier = b.state<ClusterBarrier>();
  if (!barrier.arrived[me.number]) b.fail("barrier.cluster.wait: has not arrived");
  if (barrier.at[me.number] == barrier.generation) b.wait(barrier, "barrier.cluster.wait", EMU_SITE);
  barrier.arrived[me.number] = false;
  memory::acquire(barrier.complete);
}

}  // namespace sparseops_emulation
