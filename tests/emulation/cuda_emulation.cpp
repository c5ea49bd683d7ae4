// The device functions of CUDA C++, and the launch of a grid. See cuda_emulation.h.
#include "cuda_emulation.h"

#include <cstring>
#include <mutex>

#include "block.h"
#include "cuda_runtime_emulation.h"
#include "faults.h"

dim3 gridDim, blockDim;
uint3 blockIdx, threadIdx;

namespace sparseops_emulation {

using memory::Access;

// ---- the launch

namespace {

void require(bool holds, const char* rule) {
  if (!holds) throw Refused(rule);
}

void check_bounds(dim3 grid, dim3 block, std::size_t shared_bytes, unsigned cluster) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  require(threads > 0 && threads <= kMaxThreads && block.z <= 64, "a block must have 1 to 1024 threads");
  require(grid.x > 0 && grid.y > 0 && grid.z > 0, "a grid must have a block");
  require(grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16, "a grid must be within 2^31-1, 65535, 65535");
  require(shared_bytes <= kMaxSharedBytes, "a block must ask for at most 227 KiB of shared memory");
  require(cluster > 0 && cluster <= kMaxCluster, "a cluster must have 1 to 8 blocks");
  require(grid.x % cluster == 0, "a grid must be whole clusters along x");
  require(cluster == 1 || threads % 32 == 0, "here, blocks of a cluster must be whole warps");
}

}  // namespace

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, unsigned cluster, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  check_bounds(grid, block, shared_bytes, cluster);
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> order(std::size_t{grid.x} * grid.y * grid.z / cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i * cluster;
  if (seed()) std::shuffle(order.begin(), order.end(), std::mt19937_64(seed()));
  const FaultHandler faults;
  memory::begin_launch();
  Block runner(block.x * block.y * block.z, shared_bytes, cluster);
  try {
    for (const unsigned i : order) runner.run(i, {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}, thread);
  } catch (const Error& error) {
    const std::string races = memory::take_races();  // they may well be the reason
    throw Error(error.what() + (races.empty() ? "" : "\n" + races));
  }
  if (const std::string races = memory::take_races(); !races.empty()) throw Error(races);
}

// ---- collectives

void shuffle(Shuffle kind, std::uint32_t mask, void* value, std::size_t bytes, int operand, int width) {
  static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_down_sync", "__shfl_up_sync", "__shfl_xor_sync"};
  const char* name = kNames[int(kind)];
  const void* site = EMU_SITE;
  struct Lane {
    void* value;
    int operand;
    unsigned char in[16];
  } lane{value, operand, {}};
  Block& b = block();
  if (bytes > sizeof lane.in || width < 1 || width > 32 || (width & (width - 1)))
    b.fail("%s: %zu bytes in groups of %d lanes", name, bytes, width);
  std::memcpy(lane.in, value, bytes);
  b.meet(
      name, mask, &lane,
      [&](const Lanes& lanes) {
        for (int i = 0; i < 32; ++i) {
          if (!lanes[i]) continue;
          const auto me = static_cast<const Lane*>(lanes[i]);
          const int first = i / width * width, last = first + width - 1;
          int from = i;
          if (kind == Shuffle::index) from = first + me->operand % width;
          if (kind == Shuffle::down) from = i + me->operand > last ? i : i + me->operand;
          if (kind == Shuffle::up) from = i - me->operand < first ? i : i - me->operand;
          if (kind == Shuffle::exclusive_or) from = (i ^ me->operand) > last ? i : i ^ me->operand;
          if (from < 0 || !lanes[from]) b.fail("%s: lane %d reads lane %d, which is outside the mask", name, i, from);
          std::memcpy(me->value, static_cast<const Lane*>(lanes[from])->in, bytes);
        }
      },
      site);
}

namespace {

std::uint32_t ballot(const char* name, std::uint32_t mask, bool predicate, const void* site) {
  struct Lane {
    bool in;
    std::uint32_t out;
  } lane{predicate, 0};
  block().meet(
      name, mask, &lane,
      [](const Lanes& lanes) {
        std::uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= std::uint32_t(lanes[i] && static_cast<const Lane*>(lanes[i])->in) << i;
        for (void* each : lanes)
          if (each) static_cast<Lane*>(each)->out = bits;
      },
      site);
  return lane.out;
}

// The bytes as two integers or more: a memcpy would not notice that the address is no multiple of `bytes`.
void require_aligned(const void* address, std::size_t bytes, const void* site) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes == 0) return;
  block().self().site = site;
  block().fail("an access of %zu bytes at an address that is no multiple of them", bytes);
}

}  // namespace

// ---- memory

void load(void* to, const void* from, std::size_t bytes, Access access) {
  require_aligned(from, bytes, EMU_SITE);
  memory::check(from, bytes, access, EMU_SITE);
  memory::count(from, bytes, access, EMU_SITE);
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, std::size_t bytes) {
  require_aligned(to, bytes, EMU_SITE);
  memory::check(to, bytes, Access::write, EMU_SITE);
  memory::count(to, bytes, Access::write, EMU_SITE);
  std::memcpy(to, from, bytes);
}

void relaxed_atomic(const void* address, std::size_t bytes, const void* site) {
  require_aligned(address, bytes, site);
  memory::check(address, bytes, Access::atomic, site);
  memory::relaxed_atomic(address);
}

void trap() {
  block().self().site = EMU_SITE;
  block().fail("__trap");
}

}  // namespace sparseops_emulation

using emu::block;

void __syncthreads() { block().barrier("__syncthreads", EMU_SITE); }

int __syncthreads_count(int predicate) { return block().barrier_sum("__syncthreads_count", predicate != 0, EMU_SITE); }

int __syncthreads_and(int predicate) { return block().barrier_sum("__syncthreads_and", predicate == 0, EMU_SITE) == 0; }

int __syncthreads_or(int predicate) { return block().barrier_sum("__syncthreads_or", predicate != 0, EMU_SITE) != 0; }

void __syncwarp(unsigned mask) {
  char none;
  const unsigned first = block().self().number / 32 * 32;
  block().meet("__syncwarp", mask, &none, [=](const emu::Lanes&) { emu::memory::met(first, mask); }, EMU_SITE);
}

unsigned __ballot_sync(unsigned mask, int predicate) {
  return emu::ballot("__ballot_sync", mask, predicate != 0, EMU_SITE);
}

int __any_sync(unsigned mask, int predicate) { return emu::ballot("__any_sync", mask, predicate != 0, EMU_SITE) != 0; }

int __all_sync(unsigned mask, int predicate) {
  return emu::ballot("__all_sync", mask, predicate != 0, EMU_SITE) == mask;
}

void __threadfence() { emu::memory::fence(); }
