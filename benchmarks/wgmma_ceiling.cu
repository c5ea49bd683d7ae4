// How many clocks a wgmma.mma_async.sp takes at best, and how many while the copy engine fills other shared memory: what
// bounds the kernels for sm_90a from above. On a GPU of compute capability 9.0, at the root of the clone:
//
//     nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Icsrc -o build/wgmma_ceiling benchmarks/wgmma_ceiling.cu
//     build/wgmma_ceiling [HALVES [BLOCKS]]
//
// It prints a line of CSV for each case; benchmarks/gpu_ceiling.py does all of this, and compares with a model. A block
// of two or three warpgroups takes a multiprocessor and multiplies as the kernels' main loop does: halves of a stage, of
// two steps for every 64 rows, one half always under way. Nothing new is read in between. With `cluster` above 0 one more
// thread has the copy engine bring as many bytes as the tile of a kernel would need for every half, in clusters of that
// many blocks that share the activations; the instructions wait for them, but read other places. All operands are ones,
// so each sum must be 16 for every step.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/wgmma_sp.cuh"

namespace {

using namespace sparseops;

constexpr int kSlots = 4;           // halves of a stage whose bytes may be on their way or there
constexpr int kSourceRows = 16384;  // 2 MB, which stay in the L2 cache
constexpr int kSumOfStep = 16;      // of the 32 products half are done
constexpr uint16_t kOne = 0x3c00;   // in f16

template <int kFeatures_, int kTokens_, int kConsumers_, bool kFromRegisters_>
struct Case {
  static constexpr int kFeatures = kFeatures_, kTokens = kTokens_, kConsumers = kConsumers_;
  static constexpr bool kFromRegisters = kFromRegisters_;
  static constexpr int kThreads = 128 * kConsumers, kRowTiles = kFeatures / kConsumers / 64;  // that multiply
  // 128 bytes a row: what is multiplied, then the slots with half of a stage's weight each.
  static constexpr int kOperandRows = kFeatures > kTokens ? kFeatures : kTokens;
  static constexpr int kWeightRows = kFromRegisters ? 0 : kFeatures / 2, kSlotRows = kTokens + kWeightRows;
  static constexpr int kBarriersAt = (kOperandRows + kSlots * kSlotRows) * 128;
  static constexpr int kSharedBytes = kBarriersAt + 2 * kSlots * 8;
  // Of a thread that asks for fillings, and of one that multiplies, as the kernels have them.
  static constexpr int kFewRegisters = 40, kManyRegisters = kConsumers == 3 ? 152 : 232;
  static_assert(128 * (kFewRegisters + kConsumers * kManyRegisters) <= 65536);
  static_assert(kRowTiles * kTokens <= 256 && kSharedBytes <= 227 * 1024);
};

// A filling of a slot for every half, in turns around the slots.
template <class C>
struct Fills {
  const CUtensorMap *activations, *weight;
  uint32_t base, cluster, rank;

  SPARSEOPS_DEVICE uint32_t full(int half) const { return base + C::kBarriersAt + half % kSlots * 8; }
  SPARSEOPS_DEVICE uint32_t empty(int half) const { return full(half) + kSlots * 8; }

  SPARSEOPS_DEVICE void init() const {
    for (int slot = 0; slot < kSlots; ++slot) {
      ptx::mbarrier_init(full(slot), 1);
      ptx::mbarrier_init(empty(slot), C::kConsumers * cluster);
    }
    ptx::fence_mbarrier_init();
  }

  SPARSEOPS_DEVICE void ask_for(int half) const {
    const uint32_t share = C::kTokens / cluster, to = base + (C::kOperandRows + half % kSlots * C::kSlotRows) * 128;
    const int row = (half + static_cast<int>(blockIdx.x / cluster) * 5) * 256 % kSourceRows;
    ptx::mbarrier_wait(empty(half), half / kSlots % 2 ^ 1);
    ptx::mbarrier_arrive_expect_tx(full(half), C::kSlotRows * 128);
    const int at[] = {0, row + static_cast<int>(rank * share)};
    if (cluster == 1) {
      ptx::tma_load<2>(to, activations, full(half), at, ptx::L2Policy::normal);
    } else {
      const auto ranks = static_cast<uint16_t>((1 << cluster) - 1);
      ptx::tma_load_multicast(to + rank * share * 128, activations, full(half), at, ranks);
    }
    if constexpr (C::kWeightRows > 0)
      ptx::tma_load<2>(to + C::kTokens * 128, weight, full(half), {0, row}, ptx::L2Policy::normal);
  }

  SPARSEOPS_DEVICE void await(int half) const { ptx::mbarrier_wait(full(half), half / kSlots % 2); }

  SPARSEOPS_DEVICE void release(int half) const {
    if (threadIdx.x % 128 < cluster) ptx::mbarrier_arrive_cluster(empty(half), threadIdx.x % 128);
  }
};

SPARSEOPS_DEVICE long long now() {
#if defined(__CUDA_ARCH__)
  return clock64();
#else
  return 0;
#endif
}

// What a warpgroup does: `halves` times two steps.
template <class C, bool kFills>
SPARSEOPS_DEVICE void multiply(const Fills<C>& fills, int halves, long long* clocks, unsigned* wrong) {
  const int consumer = static_cast<int>(threadIdx.x) / 128;
  const uint64_t b = ptx::descriptor_128b(fills.base);
  const uint64_t a = ptx::descriptor_128b(fills.base + consumer * C::kRowTiles * 64 * 128);
  uint32_t ones[4] = {kOne * 0x10001u, kOne * 0x10001u, kOne * 0x10001u, kOne * 0x10001u};
  const uint32_t metadata = 0xe9d4c84e;  // all six ways to keep two of four
  float sums[C::kRowTiles][C::kTokens / 2];
  ptx::keep_in_registers(ones);  // else each instruction would get a copy

  const long long start = now();
#pragma unroll 1
  for (int half = 0; half < halves; ++half) {
    if constexpr (kFills) fills.await(half);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int tile = 0; tile < C::kRowTiles; ++tile) {
        const bool add = half > 0 || step > 0;
        const uint64_t b_step = b + step * (64 >> 4);
        if constexpr (C::kFromRegisters) {
          ptx::wgmma_sp<__half, C::kTokens>(sums[tile], ones, b_step, metadata, add);
        } else {
          const uint64_t a_step = a + ((tile * 64 * 128 + step * 32) >> 4);
          ptx::wgmma_sp<__half, C::kTokens>(sums[tile], a_step, b_step, metadata, add);
        }
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (kFills && half > 0) fills.release(half - 1);
  }
  ptx::wgmma_wait<0>();
  const long long end = now();
  if (threadIdx.x % 128 == 0) clocks[blockIdx.x * C::kConsumers + consumer] = end - start;

  bool right = true;
#pragma unroll
  for (int tile = 0; tile < C::kRowTiles; ++tile) {
    ptx::keep_in_registers(sums[tile]);
#pragma unroll
    for (int i = 0; i < C::kTokens / 2; ++i) right &= sums[tile][i] == static_cast<float>(2 * kSumOfStep * halves);
  }
  if (!right) atomicAdd(wrong, 1u);
}

// clocks[block][consumer]; wrong: how many threads have a sum that is not what it must be.
template <class C, bool kFills>
__global__ void __launch_bounds__(C::kThreads + (kFills ? 128 : 0), 1)
    ceiling_kernel(const __grid_constant__ CUtensorMap activations, const __grid_constant__ CUtensorMap weight,
                   int halves, int cluster, long long* clocks, unsigned* wrong) {
#if SPARSEOPS_SM90A
  const uint32_t base = ptx::shared_address(ptx::dynamic_shared());
  const Fills<C> fills{&activations, &weight, base, static_cast<uint32_t>(cluster), ptx::cluster_rank()};
  auto operands = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  for (int i = threadIdx.x; i < C::kOperandRows * 32; i += blockDim.x) operands[i] = kOne * 0x10001u;
  ptx::fence_proxy_async();
  if (kFills && threadIdx.x == 0) fills.init();
  ptx::wait_for_predecessor();
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if constexpr (!kFills) {
    multiply<C, kFills>(fills, halves, clocks, wrong);
  } else if (threadIdx.x >= C::kThreads) {
    ptx::decrease_registers<C::kFewRegisters>();
    if (threadIdx.x < C::kThreads + 32 && ptx::elect_one()) {
#pragma unroll 1
      for (int half = 0; half < halves; ++half) fills.ask_for(half);
    }
  } else {
    ptx::increase_registers<C::kManyRegisters>();
    multiply<C, kFills>(fills, halves, clocks, wrong);
  }
  // A block's memory must last for as long as others of its cluster write to it.
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();
#endif
}
void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "wgmma_ceiling: %s\n", cudaGetErrorString(error));
  std::exit(2);
}

template <class T>
T* device_memory(size_t count, const T* from) {
  void* memory;
  check(cudaMalloc(&memory, count * sizeof(T)));
  check(cudaMemcpy(memory, from, count * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(memory);
}

struct Bench {
  int most_blocks, halves;
  uint16_t* source;

  CUtensorMap map(int rows) const {
    CUtensorMap found{};
    const char* error = encode_matrix(&found, DType::f16, source, 64, kSourceRows, 128, rows);
    if (error) {
      std::fprintf(stderr, "wgmma_ceiling: %s\n", error);
      std::exit(2);
    }
    return found;
  }

  // cluster 0: nothing is filled. Of three runs the last counts.
  template <class C, bool kFills>
  void run(int cluster) const {
    const int size = kFills ? cluster : 1, blocks = most_blocks / size * size;
    const CUtensorMap activations = map(C::kTokens / size), weight = map(std::max(C::kWeightRows, 8));
    std::vector<long long> clocks(blocks * C::kConsumers);
    unsigned wrong = 0;
    auto device_clocks = device_memory(clocks.size(), clocks.data());
    auto device_wrong = device_memory(1, &wrong);
    for (int i = 0; i < 3; ++i) {
      check(launch_clusters(ceiling_kernel<C, kFills>, blocks, C::kThreads + (kFills ? 128 : 0), C::kSharedBytes, size,
                            nullptr, activations, weight, halves, size, device_clocks, device_wrong));
      check(cudaDeviceSynchronize());
    }
    check(cudaMemcpy(clocks.data(), device_clocks, clocks.size() * sizeof(long long), cudaMemcpyDeviceToHost));
    check(cudaMemcpy(&wrong, device_wrong, sizeof wrong, cudaMemcpyDeviceToHost));
    check(cudaFree(device_clocks));
    check(cudaFree(device_wrong));
    std::vector<double> of_blocks;  // the slowest of each block's warpgroups
    for (int block = 0; block < blocks; ++block) {
      const auto first = clocks.begin() + block * C::kConsumers;
      of_blocks.push_back(static_cast<double>(*std::max_element(first, first + C::kConsumers)));
    }
    std::sort(of_blocks.begin(), of_blocks.end());
    const double instructions = 2.0 * halves * C::kConsumers * C::kRowTiles;
    std::printf("%s,%d,%d,%d,%d,%d,%.2f,%.2f,%u\n", C::kFromRegisters ? "RS" : "SS", C::kFeatures, C::kTokens,
                C::kConsumers, cluster, halves, of_blocks[blocks / 2] / instructions,
                of_blocks[blocks - 1] / instructions, wrong);
    std::fflush(stdout);
  }

  template <class C>
  void run_all() const {
    run<C, false>(0);
    for (int cluster : {1, 2, 4}) run<C, true>(cluster);
  }
};

}  // namespace

int main(int argc, char** argv) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9 || device.minor != 0) {
    std::fprintf(stderr, "wgmma_ceiling: not for this GPU: its compute capability is %d.%d, not 9.0\n", device.major,
                 device.minor);
    return 3;
  }
  // 2^19 steps of 16 are the last that f32 counts exactly
  const int halves = argc > 1 ? std::min(std::max(std::atoi(argv[1]), kSlots), 1 << 18) : 4000;
  const std::vector<uint16_t> ones(kSourceRows * 64, kOne);
  const int blocks = argc > 2 ? std::max(std::atoi(argv[2]), 4) : device.multiProcessorCount;
  const Bench bench{blocks, halves, device_memory(ones.size(), ones.data())};
  std::printf("form,features,tokens,consumers,cluster,halves,clocks,slowest,wrong\n");
  bench.run_all<Case<128, 256, 2, false>>();
  bench.run_all<Case<128, 256, 2, true>>();
  bench.run_all<Case<192, 192, 3, false>>();
  bench.run_all<Case<192, 192, 3, true>>();
  bench.run_all<Case<256, 128, 2, false>>();
  bench.run_all<Case<256, 128, 2, true>>();
  bench.run<Case<192, 256, 3, false>, false>(0);  // more would not fit into the registers
  check(cudaFree(bench.source));
  return 0;
}
