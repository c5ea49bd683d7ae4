// What the race check must report, and what it must let pass. In builds without it, the correct variants only compute.
#include "cuda/ptx.cuh"
#include "test_support.h"

using namespace sparseops;

namespace {

constexpr int kThreads = 128;

void expect_race(const std::string& part, const std::function<void()>& body) {
  if (emu::memory::kChecked) emu::expect_error(part, body);
}

template <class T>
void expect_all(const emu::Buffer<T>& got, T value) {
  emu::expect_equal(got, std::vector<T>(got.size(), value));
}

// ---- within a block

enum class Order { none, warp, block };

SPARSEOPS_DEVICE void wait_for_others(Order order) {
  if (order == Order::warp) __syncwarp();
  if (order == Order::block) __syncthreads();
}

__global__ void exchange(int* out, Order order, int distance) {
  int* tile = reinterpret_cast<int*>(ptx::dynamic_shared());
  tile[threadIdx.x] = 1;
  wait_for_others(order);
  out[threadIdx.x] = tile[threadIdx.x ^ distance];
}

__global__ void exchange_through_a_variable(int* out, Order order) {
  alignas(16) __shared__ int tile[kThreads];
  tile[threadIdx.x] = 1;
  wait_for_others(order);
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Reads a tile, then fills it again.
__global__ void use_again(int* out, Order order) {
  int* tile = reinterpret_cast<int*>(ptx::dynamic_shared());
  tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[(threadIdx.x + 32) % kThreads];
  wait_for_others(order);
  tile[threadIdx.x] = 2;
}

// The writer comes last to the first barrier and so runs on at once, while the readers still stand in it.
__global__ void write_behind_a_barrier(int* out, Order order) {
  int* word = reinterpret_cast<int*>(ptx::dynamic_shared());
  __syncthreads();
  if (threadIdx.x == kThreads - 1) *word = 1;
  wait_for_others(order);
  if (threadIdx.x < kThreads - 1) out[threadIdx.x] = *word;
}

__global__ void read_as_matrices(uint32_t* out, Order order) {
  unsigned char* tile = ptx::dynamic_shared();
  reinterpret_cast<uint4*>(tile)[threadIdx.x] = {1, 1, 1, 1};
  wait_for_others(order);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(tile) + threadIdx.x * 16);
  out[threadIdx.x] = r[0] & r[1] & r[2] & r[3];
}

// One lane writes what all lanes load: the lane that arrives last, if they run in order.
__global__ void read_matrices_of_one_writer(uint32_t* out, Order order) {
  unsigned char* tile = ptx::dynamic_shared();
  if (threadIdx.x == 31)
    for (int i = 0; i < 32; ++i) reinterpret_cast<uint4*>(tile)[i] = make_uint4(1, 1, 1, 1);
  wait_for_others(order);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(tile) + threadIdx.x * 16);
  out[threadIdx.x] = r[0] & r[1] & r[2] & r[3];
}

// All read one word, which a thread overwrites that has waited for the readers of its warp alone, or of the block.
__global__ void overwrite_what_all_read(int* out, Order order) {
  int* word = reinterpret_cast<int*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) *word = 1;
  __syncthreads();
  out[threadIdx.x] = *word;
  wait_for_others(order);
  if (threadIdx.x == kThreads - 1) *word = 2;  // in order, the first to leave the barrier and to read
}

__global__ void copy_then_read(const uint4* in, uint4* out, bool wait, Order order) {
  uint4* tile = reinterpret_cast<uint4*>(ptx::dynamic_shared());
  tile[threadIdx.x] = make_uint4(0, 0, 0, 0);
  ptx::cp_async<16>(ptx::shared_address(tile + threadIdx.x), in + threadIdx.x, 16);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  wait_for_others(order);
  out[threadIdx.x] = tile[threadIdx.x ^ 64];
  __syncthreads();
  ptx::cp_async_wait<0>();
}

// The next copy into a tile that others still read.
__global__ void copy_too_soon(const uint4* in, uint4* out, Order order) {
  uint4* tile = reinterpret_cast<uint4*>(ptx::dynamic_shared());
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 64];
  wait_for_others(order);
  ptx::cp_async<16>(ptx::shared_address(tile + threadIdx.x), in + threadIdx.x, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

void within_a_block(emu::Tests& tests) {
  emu::Buffer<int> out(kThreads);
  emu::Buffer<uint32_t> words(32);
  emu::Buffer<uint4> in(kThreads, {7, 7, 7, 7}), copies(kThreads);
  const auto go = [&](auto kernel, auto... arguments) {
    return [=] { emu::run(kernel, 1, kThreads, 16 * kThreads, arguments...); };
  };
  tests.run("__syncthreads orders shared memory", [&] {
    go(exchange, out.data(), Order::block, 64)();
    expect_all(out, 1);
  });
  tests.run("__syncwarp orders shared memory within a warp", [&] {
    go(exchange, out.data(), Order::warp, 1)();
    expect_all(out, 1);
  });
  tests.run("a missing __syncwarp", [&] { expect_race("race in shared", go(exchange, out.data(), Order::none, 1)); });
  tests.run("__syncwarp does not order warps",
            [&] { expect_race("race in shared", go(exchange, out.data(), Order::warp, 64)); });
  tests.run("a __shared__ variable", [&] {
    go(exchange_through_a_variable, out.data(), Order::warp)();
    expect_all(out, 1);
  });
  tests.run("a __shared__ variable without a barrier",
            [&] { expect_race("race in shared", go(exchange_through_a_variable, out.data(), Order::none)); });
  tests.run("a tile used again", [&] {
    go(use_again, out.data(), Order::block)();
    expect_all(out, 1);
  });
  tests.run("a tile used again without a barrier",
            [&] { expect_race("race in shared", go(use_again, out.data(), Order::none)); });
  tests.run("a write behind a barrier", [&] { go(write_behind_a_barrier, out.data(), Order::block)(); });
  tests.run("a write behind a barrier that orders only what came before",
            [&] { expect_race("race in shared", go(write_behind_a_barrier, out.data(), Order::none)); });
  tests.run("ldmatrix", [&] {
    emu::run(read_as_matrices, 1, 32, 512, words.data(), Order::warp);
    expect_all(words, 1u);
  });
  tests.run("ldmatrix orders no memory", [&] {
    expect_race("race in shared", [&] { emu::run(read_as_matrices, 1, 32, 512, words.data(), Order::none); });
    const auto one_writer = [&](Order order) {
      emu::run(read_matrices_of_one_writer, 1, 32, 512, words.data(), order);
    };
    one_writer(Order::warp);
    expect_all(words, 1u);
    expect_race("race in shared", [&] { one_writer(Order::none); });
  });
  tests.run("a word that all have read", [&] {
    go(overwrite_what_all_read, out.data(), Order::block)();
    expect_all(out, 1);
  });
  tests.run("a word that others may still read",
            [&] { expect_race("race in shared", go(overwrite_what_all_read, out.data(), Order::warp)); });
  tests.run("cp.async", [&] {
    go(copy_then_read, in.data(), copies.data(), true, Order::block)();
    emu::expect_equal(copies, std::vector<uint4>(kThreads, {7, 7, 7, 7}));
  });
  tests.run("cp.async without a barrier",
            [&] { expect_race("race in shared", go(copy_then_read, in.data(), copies.data(), true, Order::none)); });
  tests.run("cp.async without a wait", [&] {
    expect_race("race in shared", go(copy_then_read, in.data(), copies.data(), false, Order::block));
    if (!emu::memory::kChecked) {
      go(copy_then_read, in.data(), copies.data(), false, Order::block)();
      emu::expect_equal(copies, std::vector<uint4>(kThreads, {~0u, ~0u, ~0u, ~0u}));
    }
  });
  tests.run("cp.async into a tile that was read", go(copy_too_soon, in.data(), copies.data(), Order::block));
  tests.run("cp.async into a tile that is being read",
            [&] { expect_race("race in shared", go(copy_too_soon, in.data(), copies.data(), Order::none)); });
}

// ---- between blocks

__global__ void all_write(int* out) {
  if (threadIdx.x == 0) out[0] = 1;
}

__global__ void first_writes_others_read(int* data, int* out) {
  if (blockIdx.x == 0)
    data[threadIdx.x] = 1;
  else
    out[threadIdx.x] = data[threadIdx.x];
}

__global__ void first_reads_last_writes(int* data, int* out) {
  if (blockIdx.x == 0)
    out[threadIdx.x] = data[threadIdx.x];
  else
    data[threadIdx.x] = 1;
}

__global__ void all_read_last_writes(int* data, int* out) {
  out[blockIdx.x * kThreads + threadIdx.x] = data[threadIdx.x];
  if (blockIdx.x == gridDim.x - 1) data[threadIdx.x] = 1;
}

__global__ void count_blocks(unsigned* counter, int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = int(atomicAdd(counter, 1));
}

__global__ void write_then_read_only(int* data, int* out) {
  data[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = __ldg(data + threadIdx.x);
}

__global__ void write_then_stream(int* data, uint4* out) {
  data[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x < kThreads / 4) out[threadIdx.x] = ptx::load_streaming(data + 4 * threadIdx.x);
}

// How the last block to finish learns that the others have.
enum class Protocol {
  acquire_release,
  no_barrier_before,
  no_barrier_after,
  relaxed,
  release_only,
  acquire_only,
  fences,
  no_fence_before,
  no_fence_after,
  write_after,  // the atomic, instead of before
};

__device__ inline unsigned count_in(unsigned* counter, Protocol protocol) {
  switch (protocol) {
    case Protocol::acquire_release:
    case Protocol::no_barrier_before:
    case Protocol::no_barrier_after:
    case Protocol::write_after:
      return ptx::atomic_add_acq_rel(counter, 1);
    case Protocol::release_only:
      emu::memory::release(counter);
      return atomicAdd(counter, 1);
    case Protocol::acquire_only:
      emu::memory::acquire(counter);
      return atomicAdd(counter, 1);
    default:
      break;
  }
  if (protocol == Protocol::fences || protocol == Protocol::no_fence_after) __threadfence();
  const unsigned before = atomicAdd(counter, 1);
  if (protocol == Protocol::fences || protocol == Protocol::no_fence_before) __threadfence();
  return before;
}

// Each block writes its part of a sum; the last one adds them up and sets the counter back.
__global__ void split_sum(float* partials, unsigned* counter, float* out, Protocol protocol) {
  __shared__ unsigned before;
  partials[blockIdx.x * kThreads + threadIdx.x] = float(blockIdx.x + 1);
  if (protocol != Protocol::no_barrier_before) __syncthreads();
  if (threadIdx.x == 0) {
    before = count_in(counter, protocol);
    if (protocol == Protocol::write_after) partials[blockIdx.x * kThreads] = float(blockIdx.x + 1);
  }
  if (protocol != Protocol::no_barrier_after) __syncthreads();
  if (before != gridDim.x - 1) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partials[i * kThreads + threadIdx.x];
  out[threadIdx.x] = sum;
  if (threadIdx.x == 0) *counter = 0;
}

void between_blocks(emu::Tests& tests) {
  emu::Buffer<int> data(kThreads, 0), out(kThreads);
  emu::Buffer<uint4> vectors(kThreads / 4);
  const auto go = [&](auto kernel, unsigned blocks, auto... arguments) {
    return [=] { emu::run(kernel, blocks, kThreads, 0, arguments...); };
  };
  tests.run("two blocks write one element",
            [&] { expect_race("between blocks in global", go(all_write, 2, out.data())); });
  tests.run("a block reads what another wrote",
            [&] { expect_race("between blocks in global", go(first_writes_others_read, 2, data.data(), out.data())); });
  tests.run("a block writes what another read",
            [&] { expect_race("between blocks in global", go(first_reads_last_writes, 2, data.data(), out.data())); });
  tests.run("a block writes what it and others read", [&] {
    emu::Buffer<int> all(2 * kThreads);
    expect_race("between blocks in global", go(all_read_last_writes, 2, data.data(), all.data()));
  });
  tests.run("a launch reads what an earlier one wrote", [&] {
    go(first_writes_others_read, 1, data.data(), out.data())();
    go(first_reads_last_writes, 1, data.data(), out.data())();
    expect_all(out, 1);
  });
  tests.run("atomics do not race with atomics", [&] {
    emu::Buffer<unsigned> counter(1, 0u);
    go(count_blocks, 9, counter.data(), out.data())();
    expect_all(counter, 9u);
  });
  tests.run("ld.global.nc of what the launch wrote", [&] {
    expect_race("in read-only global", go(write_then_read_only, 1, data.data(), out.data()));
    expect_race("in read-only global", go(write_then_stream, 1, data.data(), vectors.data()));
  });

  constexpr unsigned kBlocks = 5;
  const auto sum = [&](Protocol protocol) {
    emu::Buffer<float> partials(kBlocks * kThreads), result(kThreads);
    emu::Buffer<unsigned> counter(1, 0u);
    for (int launch = 0; launch < 2; ++launch) {  // a counter that was not set back would spoil the second
      result.fill(-1);
      emu::run(split_sum, kBlocks, kThreads, 0, partials.data(), counter.data(), result.data(), protocol);
      expect_all(result, 15.f);
      expect_all(counter, 0u);
    }
  };
  tests.run("a sum split over blocks", [&] { sum(Protocol::acquire_release); });
  tests.run("a sum split over blocks, by fences", [&] { sum(Protocol::fences); });
  for (const auto& [protocol, name] : {std::pair{Protocol::no_barrier_before, "no barrier before the atomic"},
                                       {Protocol::relaxed, "a relaxed atomic"},
                                       {Protocol::release_only, "an atomic that does not acquire"},
                                       {Protocol::acquire_only, "an atomic that does not release"},
                                       {Protocol::no_fence_before, "no fence before the atomic"},
                                       {Protocol::no_fence_after, "no fence after the atomic"},
                                       {Protocol::write_after, "a write after the atomic"}})
    tests.run(std::string("a sum split over blocks: ") + name,
              [&, protocol = protocol] { expect_race("between blocks in global", [&] { sum(protocol); }); });
  tests.run("a sum split over blocks: no barrier after the atomic",
            [&] { expect_race("race in shared", [&] { sum(Protocol::no_barrier_after); }); });
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  within_a_block(tests);
  between_blocks(tests);
  return tests.result();
}
