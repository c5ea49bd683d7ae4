// Barriers of some warps, clusters, the pool of registers, work in the background: as the emulator has them, and each
// mistake with them.
#include "cuda/ptx_sm90.cuh"
#include "test_support.h"

using namespace sparseops;

namespace {

void expect_race(const std::string& part, const std::function<void()>& body) {
  if (emu::memory::kChecked) emu::expect_error(part, body);
}

template <class T>
void expect_all(const emu::Buffer<T>& got, T value) {
  emu::expect_equal(got, std::vector<T>(got.size(), value));
}

// ---- named barriers

// Each half of the block exchanges words by a barrier of its own, as often as asked; `distance` says with whom.
__global__ void exchange_in_halves(int* out, int distance, int times) {
  int* words = reinterpret_cast<int*>(ptx::dynamic_shared());
  const unsigned half = threadIdx.x / 64;
  for (int i = 0; i < times; ++i) {
    words[threadIdx.x] = i + 1;
    ptx::named_barrier(1 + half, 64);
    out[threadIdx.x] = words[int(threadIdx.x) ^ distance];
    ptx::named_barrier(1 + half, 64);
  }
}

// Of four warps, two meet, then the other two, at one barrier.
__global__ void use_in_turn(int* out) {
  int* words = reinterpret_cast<int*>(ptx::dynamic_shared());
  const unsigned pair = threadIdx.x / 64;
  if (pair == 1) ptx::named_barrier(2, 128);
  words[threadIdx.x] = 1;
  ptx::named_barrier(1, 64);
  out[threadIdx.x] = words[threadIdx.x ^ 32];
  if (pair == 0) ptx::named_barrier(2, 128);
}

enum class Barrier {
  all,
  zero,
  zero_of_some,
  sixteen,
  part_of_a_warp,
  more_than_the_block,
  nobody,
  mixed_counts,
  missing_warp,
  part_of_the_lanes,
  two_in_a_warp
};

__global__ void meet(Barrier how) {
  const unsigned warp = threadIdx.x / 32;
  switch (how) {
    case Barrier::all:
      return ptx::named_barrier(15, 128);
    case Barrier::zero:
      return warp < 2 ? __syncthreads() : ptx::named_barrier(0, 128);
    case Barrier::zero_of_some:
      return ptx::named_barrier(0, 64);
    case Barrier::sixteen:
      return ptx::named_barrier(16, 128);
    case Barrier::part_of_a_warp:
      return ptx::named_barrier(1, 48);
    case Barrier::more_than_the_block:
      return ptx::named_barrier(1, 160);
    case Barrier::nobody:
      return ptx::named_barrier(1, 0);
    case Barrier::mixed_counts:
      return ptx::named_barrier(1, warp < 2 ? 128 : 96);
    case Barrier::missing_warp:
      return warp < 3 ? ptx::named_barrier(1, 128) : void();
    case Barrier::part_of_the_lanes:
      return threadIdx.x % 2 ? ptx::named_barrier(1, 64) : void();
    case Barrier::two_in_a_warp:
      return ptx::named_barrier(1 + threadIdx.x % 2, 64);
  }
}

void named_barriers(emu::Tests& tests) {
  static emu::Buffer<int> out(128);
  tests.run("two named barriers", [] {
    emu::run(exchange_in_halves, 1, 128, 512, out.data(), 63, 5);
    expect_all(out, 5);
  });
  tests.run("a named barrier orders no others", [] {
    expect_race("race in shared", [] { emu::run(exchange_in_halves, 1, 128, 512, out.data(), 64, 1); });
  });
  tests.run("a named barrier used in turn", [] {
    emu::run(use_in_turn, 1, 128, 512, out.data());
    expect_all(out, 1);
  });
  tests.run("barriers 15 and 0", [] {
    emu::run(meet, 1, 128, 0, Barrier::all);
    emu::run(meet, 1, 128, 0, Barrier::zero);
  });
  const auto error = [&](const char* name, const char* part, Barrier how) {
    tests.run(std::string("named barrier: ") + name, [=] {
      emu::expect_error(part, [=] { emu::run(meet, 1, 128, 0, how); });
      emu::expect_error("barriers_test.cpp", [=] { emu::run(meet, 1, 128, 0, how); });
    });
  };
  error("0 of some threads", "that of __syncthreads", Barrier::zero_of_some);
  error("16", "barrier 16, of 0 to 15", Barrier::sixteen);
  error("part of a warp", "not whole warps", Barrier::part_of_a_warp);
  error("more than the block", "not whole warps", Barrier::more_than_the_block);
  error("nobody", "not whole warps", Barrier::nobody);
  error("two counts", " elsewhere", Barrier::mixed_counts);
  error("a warp that stays away", "deadlock", Barrier::missing_warp);
  error("how many have come", "96 of 128 threads", Barrier::missing_warp);
  error("lanes that stay away", "deadlock", Barrier::part_of_the_lanes);
  error("a warp at two", "the warp diverges", Barrier::two_in_a_warp);
}

// ---- clusters

// Every thread writes its number, in its block's shared memory and in global memory.
__global__ void number_clusters(unsigned* out, unsigned* ranks) {
  unsigned* words = reinterpret_cast<unsigned*>(ptx::dynamic_shared());
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
  words[threadIdx.x] = 100 * block + threadIdx.x;
  if (threadIdx.x == 0) ranks[block] = ptx::cluster_rank();
  __syncthreads();
  out[block * blockDim.x + threadIdx.x] = words[threadIdx.x ^ 1];
}

enum class Order { barrier, none, write_after_arrive, remote_arrive, no_fence, no_wait };

// Rank 0 writes what the others read.
__global__ void tell_others(int* data, int* out, Order order) {
  const uint32_t bar = ptx::shared_address(ptx::dynamic_shared());
  const bool remote = order == Order::remote_arrive || order == Order::no_fence || order == Order::no_wait;
  if (threadIdx.x == 0 && remote) {
    ptx::mbarrier_init(bar, 32);
    if (order != Order::no_fence) ptx::fence_mbarrier_init();
  }
  if (remote) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  const unsigned rank = ptx::cluster_rank();
  if (order == Order::write_after_arrive) ptx::cluster_arrive();
  if (rank == 0) data[threadIdx.x] = 7;
  if (order == Order::barrier) ptx::cluster_arrive();
  if (order == Order::barrier || order == Order::write_after_arrive) ptx::cluster_wait();
  if (remote && rank == 0)
    for (unsigned to = 1; to < gridDim.x; ++to) ptx::mbarrier_arrive_cluster(bar, to);
  if (remote && rank > 0 && order != Order::no_wait) ptx::mbarrier_wait(bar, 0);
  if (rank > 0) out[32 * (rank - 1) + threadIdx.x] = data[threadIdx.x ^ 1];
  if (remote) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

enum class Cluster { rounds, some_end, arrive_twice, wait_alone, missing, arrive_at_ended, variable };

__global__ void meet_in_cluster(int* out, Cluster how) {
  const unsigned rank = ptx::cluster_rank();
  const uint32_t bar = ptx::shared_address(ptx::dynamic_shared());
  if (how == Cluster::rounds || how == Cluster::some_end) {
    for (int i = 0; i < 5; ++i) {
      ptx::cluster_arrive();
      if (how == Cluster::some_end && int(rank) == i % 3 && threadIdx.x % 2) return;
      ptx::cluster_wait();
    }
  }
  if (how == Cluster::arrive_twice) {
    ptx::cluster_arrive();
    ptx::cluster_arrive();
  }
  if (how == Cluster::wait_alone) ptx::cluster_wait();
  if (how == Cluster::missing) {
    if (rank == 1) __syncthreads();
    if (rank == 1 && threadIdx.x == 5) ptx::mbarrier_wait(bar, 0);
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (how == Cluster::arrive_at_ended) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(bar, 2);
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (rank == 1) return;
    for (int i = 0; i < 200; ++i) __syncthreads();  // whatever the schedule, rank 1 has ended
    if (threadIdx.x == 0) ptx::mbarrier_arrive_cluster(bar, 1);
  }
  if (how == Cluster::variable) {
    __shared__ int variable[32];
    variable[threadIdx.x] = int(rank);
    __syncthreads();
    if (rank == 0) out[threadIdx.x] = variable[threadIdx.x ^ 1];
  }
}

// The first lane waits for its block's mbarrier, which nobody arrives at.
__global__ void wait_in_vain() {
  const uint32_t bar = ptx::shared_address(ptx::dynamic_shared());
  if (threadIdx.x == 0) ptx::mbarrier_init(bar, 1);
  if (threadIdx.x == 0 && ptx::cluster_rank() == 1) ptx::mbarrier_wait(bar, 0);
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

void clusters(emu::Tests& tests) {
  tests.run("blocks of clusters", [] {
    emu::Buffer<unsigned> out(16 * 64), ranks(16), expected(16 * 64);
    for (const unsigned cluster : {1u, 2u, 8u}) {
      emu::run_cluster(number_clusters, dim3(8, 2), 64, 256, cluster, out.data(), ranks.data());
      for (unsigned i = 0; i < 16; ++i) emu::require(ranks[i] == i % cluster ? nullptr : "another rank");
      for (unsigned i = 0; i < out.size(); ++i)
        emu::require(out[i] == 100 * (i / 64) + (i % 64 ^ 1) ? nullptr : "another thread's number");
    }
  });
  tests.run("a launch of clusters, as host code makes it", [] {
    const auto launch = [](dim3 grid, unsigned threads, unsigned cluster) {
      return emu::launch_cluster(meet_in_cluster, grid, threads, 256, cluster, static_cast<int*>(nullptr),
                                 Cluster::rounds);
    };
    emu::require(launch(4, 32, 2) == cudaSuccess ? nullptr : "2 of 4");
    for (const auto& [grid, threads, cluster] : {std::tuple{3, 32, 2}, {16, 32, 16}, {4, 48, 2}, {4, 32, 0}})
      emu::require(launch(unsigned(grid), unsigned(threads), unsigned(cluster)) == cudaErrorInvalidConfiguration
                       ? nullptr
                       : "a cluster that cannot be");
    cudaGetLastError();
  });
  const auto tell = [](Order order) {
    emu::Buffer<int> data(32), out(7 * 32);
    emu::run_cluster(tell_others, 8, 32, 64, 8, data.data(), out.data(), order);
    expect_all(out, 7);
  };
  tests.run("the cluster's barrier orders its blocks", [=] { tell(Order::barrier); });
  tests.run("an arrival at another block's mbarrier orders them", [=] { tell(Order::remote_arrive); });
  tests.run("no barrier of the cluster", [=] { expect_race("race between blocks", [=] { tell(Order::none); }); });
  tests.run("a write behind the arrival",
            [=] { expect_race("race between blocks", [=] { tell(Order::write_after_arrive); }); });
  tests.run("no wait for another block's arrival",
            [=] { expect_race("race between blocks", [=] { tell(Order::no_wait); }); });
  tests.run("no fence behind the initialisation",
            [=] { emu::expect_error("had no fence.mbarrier_init", [=] { tell(Order::no_fence); }); });

  const auto meet = [](Cluster how) {
    emu::Buffer<int> out(32);
    emu::run_cluster(meet_in_cluster, 3, 32, 64, 3, out.data(), how);
  };
  tests.run("the cluster's barrier over and over", [=] { meet(Cluster::rounds); });
  tests.run("threads that have ended count as arrived", [=] { meet(Cluster::some_end); });
  const auto error = [&](const char* name, const char* part, Cluster how) {
    tests.run(std::string(name), [=] { emu::expect_error(part, [=] { meet(how); }); });
  };
  error("two arrivals at the cluster's barrier", "arrives again", Cluster::arrive_twice);
  error("a wait without an arrival", "has not arrived", Cluster::wait_alone);
  error("an mbarrier of a block that has ended", "block 1 of the cluster, which has ended", Cluster::arrive_at_ended);
  tests.run("a cluster that waits in vain", [] {
    const auto body = [] { emu::run_cluster(wait_in_vain, 2, 32, 64, 2); };
    emu::expect_error("deadlock", body);
    emu::expect_error("rank 1, threads 0-0: mbarrier.try_wait.parity (mbarrier 0x400: phase 0", body);
    emu::expect_error("barrier.cluster.wait (1 threads have not arrived)", body);
  });
  tests.run("a __shared__ variable in a cluster",
            [=] { expect_race("a __shared__ variable", [=] { meet(Cluster::variable); }); });
}

// ---- registers

template <int first, int others>
__global__ void share_registers(int* out) {
  if (threadIdx.x < 128) {
    ptx::decrease_registers<first>();
  } else {
    ptx::increase_registers<others>();
  }
  out[threadIdx.x] = 1;
}

__global__ void give_and_take(int* out) {  // what was taken is given back, and taken by another
  if (threadIdx.x < 128) ptx::decrease_registers<24>();
  if (threadIdx.x >= 128) {
    ptx::increase_registers<256>();
    ptx::decrease_registers<64>();
  }
  out[threadIdx.x] = 1;
}

template <bool more, int even, int odd>
__global__ void ask_for_registers() {
  if (threadIdx.x / 32 % 2) {
    emu::set_max_registers(odd, more);
  } else {
    emu::set_max_registers(even, more);
  }
}

void registers(emu::Tests& tests) {
  static emu::Buffer<int> out(384);
  const auto run = [](auto kernel, unsigned threads) {
    out.fill(0);
    emu::run(kernel, 1, threads, 0, out.data());
    expect_all(out, 1);
  };
  tests.run("registers: 40 and twice 232", [=] { run(share_registers<40, 232>, 384); });
  tests.run("registers: 24 and twice 240", [=] { run(share_registers<24, 240>, 384); });
  tests.run("registers: nothing changes", [=] { run(share_registers<168, 168>, 384); });
  tests.run("registers: taken, given back, taken", [=] { run(give_and_take, 384); });
  tests.run("registers: more than there are", [=] {
    emu::expect_error("deadlock", [=] { run(share_registers<40, 240>, 384); });
    emu::expect_error("setmaxnreg.inc (7168 registers are free)", [=] { run(share_registers<40, 240>, 384); });
  });
  const auto error = [&](const char* name, const char* part, auto kernel, unsigned threads) {
    tests.run(std::string("registers: ") + name, [=] {
      emu::expect_error(part, [=] { emu::run(kernel, 1, threads, 0); });
      emu::expect_error("barriers_test.cpp", [=] { emu::run(kernel, 1, threads, 0); });
    });
  };
  error("dec to more", "176 registers, but a thread has 168", ask_for_registers<false, 176, 176>, 384);
  error("inc to less", "160 registers, but a thread has 168", ask_for_registers<true, 160, 160>, 384);
  error("no multiple of 8", "of multiples of 8", ask_for_registers<false, 100, 100>, 384);
  error("too few", "from 24 to 256", ask_for_registers<false, 16, 16>, 384);
  error("too many", "from 24 to 256", ask_for_registers<true, 264, 264>, 384);
  error("two counts in a warpgroup", "elsewhere in the warpgroup", ask_for_registers<false, 40, 48>, 384);
  error("part of a warpgroup", "fewer than 128 threads", ask_for_registers<false, 40, 40>, 96);
}

__global__ void elect(int* out, bool half) {
  if (half && threadIdx.x % 2) return;
  out[threadIdx.x] = ptx::elect_one();
}

__global__ void do_nothing() {
  ptx::wait_for_predecessor();
  ptx::let_successor_start();
}

void others(emu::Tests& tests) {
  tests.run("elect_one", [] {
    emu::Buffer<int> out(64);
    emu::run(elect, 1, 64, 0, out.data(), false);
    for (int i = 0; i < 64; ++i) emu::require(out[i] == (i % 32 == 0) ? nullptr : "another lane");
    emu::expect_error("deadlock", [&] { emu::run(elect, 1, 64, 0, out.data(), true); });
  });
  tests.run("griddepcontrol", [] { emu::run(do_nothing, 2, 32, 0); });
}

// ---- work in the background

enum class Background { finish, undone, outlive, fail };

[[gnu::noinline]] std::uint64_t begin_work(std::function<void()> run, bool may_outlive) {
  return emu::block().in_background({"some work", EMU_SITE, 0, std::move(run), may_outlive});
}

__global__ void work(int* out, int* order, Background how) {
  for (int i = 0; i < 4; ++i) {
    const auto run = [=] {
      if (how == Background::fail) emu::block().fail("went wrong");
      order[i] = out[0]++;
    };
    const auto id = begin_work(run, how == Background::outlive);
    if (how == Background::finish && i == 2) emu::block().finish(id);
  }
  if (how == Background::finish || how == Background::fail)
    for (unsigned id = 1; id <= 4; ++id) emu::block().finish(id);
}

__global__ void count_in_background(int* out) {
  if (threadIdx.x == 0)
    for (int i = 0; i < 100; ++i) begin_work([=] { ++out[1]; }, true);
  for (int i = 0; i < 50; ++i) __syncthreads();
  if (threadIdx.x == 0) out[0] = out[1];  // how many were done early
}

void background(emu::Tests& tests) {
  const auto run = [](Background how) {
    emu::Buffer<int> out(1, 0), order(4, -1);
    emu::run(work, 1, 1, 0, out.data(), order.data(), how);
    return std::vector<int>(order.data(), order.data() + 4);
  };
  tests.run("work that is finished when asked for", [=] {
    for (const int place : run(Background::finish)) emu::require(place >= 0 && place < 4 ? nullptr : "not done");
    if (emu::seed() == 0 && run(Background::finish)[2] != 0) throw emu::Error("not done first");
  });
  tests.run("work that outlives its block", [=] {
    for (const int place : run(Background::outlive)) emu::require(place >= 0 && place < 4 ? nullptr : "not done");
  });
  tests.run("work that fails", [=] {
    emu::expect_error("some work: went wrong", [=] { run(Background::fail); });
    emu::expect_error("barriers_test.cpp", [=] { run(Background::fail); });
  });
  if (emu::seed() == 0)
    tests.run("work that is not done when its block ends", [=] {
      emu::expect_error("ends before its background work does: some work", [=] { run(Background::undone); });
    });
  tests.run("work is done late at seed 0, and now and then at others", [] {
    emu::Buffer<int> out(2, 0);
    emu::run(count_in_background, 1, 64, 0, out.data());
    emu::require(out[1] == 100 ? nullptr : "not all was done");
    if (emu::seed() == 0 && out[0] != 0) throw emu::Error("early");
    if (emu::seed() != 0 && out[0] == 0) throw emu::Error("never early");
  });
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  named_barriers(tests);
  clusters(tests);
  registers(tests);
  others(tests);
  background(tests);
  return tests.result();
}
