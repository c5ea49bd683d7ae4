// mbarriers as the emulator has them: phases, arrivals, bytes that copies bring, and each mistake with them.
#include "cuda/ptx_sm90.cuh"
#include "test_support.h"

using namespace sparseops;

namespace {

constexpr int kRounds = 7, kStages = 2, kWarp = 32;

void expect_race(const std::string& part, const std::function<void()>& body) {
  if (emu::memory::kChecked) emu::expect_error(part, body);
}

enum class Fault {
  none,
  no_barrier_after_init,
  no_full_wait,
  no_empty_wait,
  wrong_empty_parity,
  release_before_read,
  arrive_before_write,
  no_fence_after_init,
  expect_too_little,
  expect_too_late,  // no fault: the copy may land before its bytes are announced
  expect_too_much,
  leave_with_copy,
};

__device__ uint32_t full_bar(int stage) { return ptx::shared_address(ptx::dynamic_shared()) + 16 * stage; }
__device__ uint32_t empty_bar(int stage) { return full_bar(stage) + 8; }

__device__ void make_bars(unsigned full_arrivals, unsigned empty_arrivals, Fault fault) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full_bar(s), full_arrivals);
      ptx::mbarrier_init(empty_bar(s), empty_arrivals);
    }
    if (fault != Fault::no_fence_after_init) ptx::fence_mbarrier_init();
  }
  if (fault != Fault::no_barrier_after_init) __syncthreads();
}

__device__ void wait_for_slot(int round, Fault fault) {
  if (fault == Fault::no_empty_wait) return;
  const uint32_t parity = (round / kStages & 1) ^ 1;
  ptx::mbarrier_wait(empty_bar(round % kStages), fault == Fault::wrong_empty_parity ? parity ^ 1 : parity);
}

// The first warp hands numbers to the second, by plain stores through a ring of stages.
__global__ void ring(int* out, Fault fault) {
  int* stages = reinterpret_cast<int*>(ptx::dynamic_shared() + 64);
  make_bars(kWarp, kWarp, fault);
  const int lane = int(threadIdx.x) % kWarp;
  for (int round = 0; round < kRounds; ++round) {
    const int s = round % kStages, phase = round / kStages & 1;
    int* slot = stages + s * kWarp + (lane ^ int(threadIdx.x) / kWarp);
    if (threadIdx.x < kWarp) {
      wait_for_slot(round, fault);
      if (fault == Fault::arrive_before_write) ptx::mbarrier_arrive(full_bar(s));
      *slot = 100 * round + lane;
      if (fault != Fault::arrive_before_write) ptx::mbarrier_arrive(full_bar(s));
    } else {
      if (fault != Fault::no_full_wait) ptx::mbarrier_wait(full_bar(s), phase);
      if (fault == Fault::release_before_read) ptx::mbarrier_arrive(empty_bar(s));
      out[round * kWarp + lane] = *slot;
      if (fault != Fault::release_before_read) ptx::mbarrier_arrive(empty_bar(s));
    }
  }
}

// The same with copies in the background for the stores: one thread asks for them.
__global__ void copied_ring(const int* in, int* out, Fault fault) {
  constexpr uint32_t kBytes = kWarp * 4;
  int* stages = reinterpret_cast<int*>(ptx::dynamic_shared() + 64);
  make_bars(1, kWarp, fault);
  const int lane = int(threadIdx.x) % kWarp;
  if (threadIdx.x < kWarp && lane > 0) return;
  for (int round = 0; round < kRounds; ++round) {
    const int s = round % kStages, phase = round / kStages & 1;
    if (threadIdx.x < kWarp) {
      wait_for_slot(round, fault);
      const bool odd = fault == Fault::expect_too_little;
      const uint32_t expected = odd ? kBytes - 16 : fault == Fault::expect_too_much ? kBytes + 16 : kBytes;
      if (fault != Fault::expect_too_late) ptx::mbarrier_arrive_expect_tx(full_bar(s), expected);
      ptx::bulk_load(ptx::shared_address(stages + s * kWarp), in + round * kWarp, kBytes, full_bar(s));
      if (fault == Fault::expect_too_late) ptx::mbarrier_arrive_expect_tx(full_bar(s), expected);
      if (fault == Fault::leave_with_copy) return;
    } else {
      if (fault == Fault::leave_with_copy) return;
      if (fault != Fault::no_full_wait) ptx::mbarrier_wait(full_bar(s), phase);
      if (fault == Fault::release_before_read) ptx::mbarrier_arrive(empty_bar(s));
      out[round * kWarp + lane] = stages[s * kWarp + lane];
      if (fault != Fault::release_before_read) ptx::mbarrier_arrive(empty_bar(s));
    }
  }
}

// Two threads announce half of the bytes each.
__global__ void announce_in_halves(const int* in, int* out) {
  const uint32_t bar = full_bar(0), to = bar + 64;
  make_bars(2, 1, Fault::none);
  if (threadIdx.x < 2) {
    ptx::mbarrier_arrive_expect_tx(bar, 64);
    ptx::bulk_load(to + 64 * threadIdx.x, in + 16 * threadIdx.x, 64, bar);
  }
  ptx::mbarrier_wait(bar, 0);
  out[threadIdx.x] = reinterpret_cast<int*>(ptx::dynamic_shared() + 64)[threadIdx.x];
}

// Knows of the copy by the barrier of its block, as the thread that waited tells it.
__global__ void one_waits_for_all(const int* in, int* out, bool barrier) {
  const uint32_t bar = full_bar(0);
  make_bars(1, 1, Fault::none);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(bar, 128);
    ptx::bulk_load(bar + 64, in, 128, bar);
    ptx::mbarrier_wait(bar, 0);
  }
  if (barrier) __syncthreads();
  if (barrier || threadIdx.x == 0) out[threadIdx.x] = reinterpret_cast<int*>(ptx::dynamic_shared() + 64)[threadIdx.x];
}

// A wait tells what those did who arrived, and of no others.
__global__ void read_of_another(int* out) {
  int* words = reinterpret_cast<int*>(ptx::dynamic_shared() + 64);
  make_bars(1, 1, Fault::none);
  words[threadIdx.x] = 1;
  if (threadIdx.x == 1) ptx::mbarrier_arrive(full_bar(0));
  if (threadIdx.x == 0) {
    ptx::mbarrier_wait(full_bar(0), 0);
    out[0] = words[1] + words[2];
  }
}

void rings(emu::Tests& tests) {
  std::vector<int> expected;
  for (int i = 0; i < kRounds * kWarp; ++i) expected.push_back(100 * (i / kWarp) + (i % kWarp ^ 1));
  static emu::Buffer<int> in(kRounds * kWarp), out(kRounds * kWarp);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = int(i);
  const auto stores = [](Fault fault) { return [=] { emu::run(ring, 1, 64, 512, out.data(), fault); }; };
  const auto copies = [](Fault fault) {
    return [=] { emu::run(copied_ring, 1, 64, 512, static_cast<const int*>(in.data()), out.data(), fault); };
  };
  tests.run("a ring of stores", [=] {
    stores(Fault::none)();
    emu::expect_equal(out, expected);
  });
  tests.run("a ring of copies", [=] {
    copies(Fault::none)();
    emu::expect_equal(out, {in.data(), in.data() + in.size()});
  });
  tests.run("a copy may land before its bytes are announced", [=] {
    copies(Fault::expect_too_late)();
    emu::expect_equal(out, {in.data(), in.data() + in.size()});
  });
  tests.run("bytes announced in halves", [] {
    emu::Buffer<int> few(32);
    emu::run(announce_in_halves, 1, 32, 512, static_cast<const int*>(in.data()), few.data());
    emu::expect_equal(few, {in.data(), in.data() + 32});
  });
  tests.run("a copy that one thread waits for", [] {
    emu::Buffer<int> few(32);
    emu::run(one_waits_for_all, 1, 32, 512, static_cast<const int*>(in.data()), few.data(), true);
    emu::expect_equal(few, {in.data(), in.data() + 32});
    emu::run(one_waits_for_all, 1, 32, 512, static_cast<const int*>(in.data()), few.data(), false);
  });

  const auto race = [&](const char* name, const char* part, auto body) {
    tests.run(std::string(name), [=] { expect_race(part, body); });
  };
  race("stores: no wait for a full stage", "race in shared", stores(Fault::no_full_wait));
  race("stores: an arrival ahead of the store", "race in shared", stores(Fault::arrive_before_write));
  race("stores: a stage handed back before it was read", "race in shared", stores(Fault::release_before_read));
  race("copies: a stage handed back before it was read", "race in shared", copies(Fault::release_before_read));
  race("copies: no wait for a full stage", "copy on its way", copies(Fault::no_full_wait));
  race("a wait tells of those alone who arrived", "race in shared",
       [] { emu::run(read_of_another, 1, 3, 512, out.data()); });
  if (emu::seed() == 0)  // which thread comes first
    race("no barrier behind the initialisation", "mbarrier.init", stores(Fault::no_barrier_after_init));

  const auto error = [&](const char* name, const char* part, auto body) {
    tests.run(std::string(name), [=] { emu::expect_error(part, body); });
  };
  error("stores: no wait for an empty stage", "deadlock", stores(Fault::no_empty_wait));
  error("copies: no wait for an empty stage", "more arrivals", copies(Fault::no_empty_wait));
  error("copies: the wrong parity of an empty stage", "deadlock", copies(Fault::wrong_empty_parity));
  error("copies: no fence behind the initialisation", "had no fence.mbarrier_init", copies(Fault::no_fence_after_init));
  error("copies: too few bytes announced", "-16 bytes", copies(Fault::expect_too_little));
  error("copies: too many bytes announced", "mbarrier 0x400: phase 0, 0 of 1 arrivals missing, 16 bytes",
        copies(Fault::expect_too_much));
  if (emu::seed() == 0)  // the copy may have landed
    error("copies: the block ends before one", "ends before its background work does: bulk load",
          copies(Fault::leave_with_copy));
}

// ---- single instructions

enum class Misuse {
  none,
  not_initialised,
  misaligned,
  outside,
  no_arrivals,
  too_many_arrivals,
  twice,
  arrive_often,
  parity_2,
  no_such_phase,
  too_many_bytes,
  written_over,
  read_plainly,
  other_block,
};

__global__ void misuse(int* out, Misuse how) {
  const uint32_t bar = full_bar(0);
  if (threadIdx.x > 0) return;
  const uint32_t arrivals = how == Misuse::no_arrivals ? 0 : how == Misuse::too_many_arrivals ? 1 << 20 : 2;
  if (how != Misuse::not_initialised)
    ptx::mbarrier_init(how == Misuse::misaligned ? bar + 4 : how == Misuse::outside ? bar + 512 : bar, arrivals);
  if (how == Misuse::twice) ptx::mbarrier_init(bar, arrivals);
  if (how == Misuse::written_over) *reinterpret_cast<int*>(ptx::dynamic_shared()) = 0;
  if (how == Misuse::read_plainly) out[0] = *reinterpret_cast<int*>(ptx::dynamic_shared());
  if (how == Misuse::too_many_bytes) ptx::mbarrier_arrive_expect_tx(bar, 1 << 20);
  ptx::mbarrier_wait(bar, 1);
  if (how == Misuse::parity_2) ptx::mbarrier_wait(bar, 2);
  if (how == Misuse::arrive_often) ptx::mbarrier_arrive_expect_tx(bar, 16);
  ptx::mbarrier_arrive(bar);
  if (how == Misuse::arrive_often) ptx::mbarrier_arrive(bar);
  if (how == Misuse::other_block) ptx::mbarrier_arrive_cluster(bar, 1);
  if (how != Misuse::no_such_phase) ptx::mbarrier_arrive(bar);
  ptx::mbarrier_wait(bar, 0);
}

void misuses(emu::Tests& tests) {
  static emu::Buffer<int> out(1);
  tests.run("an mbarrier of two arrivals", [] { emu::run(misuse, 1, 32, 512, out.data(), Misuse::none); });
  const auto error = [&](const char* name, const char* part, Misuse how) {
    tests.run(std::string(name), [=] {
      const auto body = [=] { emu::run(misuse, 1, 32, 512, out.data(), how); };
      emu::expect_error(part, body);
      emu::expect_error("mbarrier_test.cpp", body);
    });
  };
  error("no initialisation", "no mbarrier was initialised at 0x400", Misuse::not_initialised);
  error("a misaligned address", "is no multiple of 8", Misuse::misaligned);
  error("an address outside", "outside the 512 bytes", Misuse::outside);
  error("an initialisation for no arrivals", "0 arrivals", Misuse::no_arrivals);
  error("an initialisation for too many arrivals", "1048576 arrivals", Misuse::too_many_arrivals);
  error("an initialisation of one in use", "is in use already", Misuse::twice);
  error("more arrivals than initialised for", "more arrivals", Misuse::arrive_often);
  error("a parity that is none", "a parity of 2", Misuse::parity_2);
  error("a phase that nothing ends", "deadlock", Misuse::no_such_phase);
  error("a phase that nothing ends: who waits for what", "phase 0, 1 of 2 arrivals missing, 0 bytes",
        Misuse::no_such_phase);
  error("too many bytes", "of at most 2^20 - 1", Misuse::too_many_bytes);
  error("a store to its bytes", "written over", Misuse::written_over);
  error("a block that there is not", "block 1 of a cluster of 1", Misuse::other_block);
  tests.run("a load of its bytes", [] {
    expect_race("an access to an mbarrier", [] { emu::run(misuse, 1, 32, 512, out.data(), Misuse::read_plainly); });
  });
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  rings(tests);
  misuses(tests);
  return tests.result();
}
