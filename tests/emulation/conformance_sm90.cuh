// The cases of conformance.cu for the instructions of compute capability 9.0: kernels, operands, and an experiment that
// only a GPU can make.
#pragma once
#include <cuda_fp8.h>

#include <array>

#include "conformance.h"
#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/wgmma_sp.cuh"

namespace conformance::sm90 {

using namespace sparseops;

// ---- wgmma.mma_async.sp. Operands: 64 rows of 8 words of kept values, n rows of 16 words of activations, a word of
// metadata for each of 128 threads, and the sums before, n / 2 for each.

constexpr int kRowsA = 64, kWordsA = 8, kWordsB = 16;
// In shared memory rows are 128 bytes, swizzled, of which the second step is used: A's bytes 32 to 63, B's 64 to 127.
constexpr uint32_t kStepA = 32, kStepB = 64, kBaseB = kRowsA * 128;

SPARSEOPS_DEVICE void put_swizzled(uint32_t byte, uint32_t word) {
  *reinterpret_cast<uint32_t*>(ptx::dynamic_shared() + (byte ^ (byte >> 7 & 7) << 4)) = word;
}

template <class T, int n, int selector, bool from_registers>
__global__ void __launch_bounds__(128) products(const uint32_t* in, uint32_t* out) {
#if SPARSEOPS_SM90A
  const uint32_t *a = in, *b = a + kRowsA * kWordsA, *metadata = b + n * kWordsB, *before = metadata + 128;
  const uint32_t t = threadIdx.x;
  if (!from_registers)
    for (uint32_t i = t; i < kRowsA * kWordsA; i += 128)
      put_swizzled(i / kWordsA * 128 + kStepA + i % kWordsA * 4, a[i]);
  for (uint32_t i = t; i < n * kWordsB; i += 128)
    put_swizzled(kBaseB + i / kWordsB * 128 + kStepB + i % kWordsB * 4, b[i]);
  ptx::fence_proxy_async();
  __syncthreads();

  ptx::sum_t<T> d[n / 2];
#pragma unroll
  for (int i = 0; i < n / 2; ++i) memcpy(&d[i], &before[t * (n / 2) + i], 4);
  const uint32_t word = metadata[t], address = ptx::shared_address(ptx::dynamic_shared());
  const uint64_t of_b = ptx::descriptor_128b(address + kBaseB) + (kStepB >> 4);
  uint32_t fragment[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) fragment[r] = a[(t / 32 * 16 + t % 32 / 4 + r % 2 * 8) * kWordsA + t % 4 + r / 2 * 4];
  ptx::wgmma_fence();
  if constexpr (from_registers) {
    ptx::wgmma_sp<T, n, selector>(d, fragment, of_b, word, true);
  } else {
    ptx::wgmma_sp<T, n, selector>(d, ptx::descriptor_128b(address) + (kStepA >> 4), of_b, word, true);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::keep_in_registers(d);
#pragma unroll
  for (int i = 0; i < n / 2; ++i) memcpy(&out[t * (n / 2) + i], &d[i], 4);
#endif
}

// A word of elements.
template <class T>
uint32_t elements(Random& random, Numbers numbers) {
  if constexpr (std::is_same_v<T, int8_t>) {
    return random.next();
  } else if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= uint32_t{element<T>(random, numbers).__x} << 8 * i;
    return word;
  } else {
    return pair<T>(random, numbers);
  }
}

template <class T, int n, int selector, bool from_registers>
void add_product(std::vector<Case>& cases, const std::string& type, Numbers numbers) {
  constexpr size_t kOperands = kRowsA * kWordsA + n * kWordsB, kMetadata = kOperands + 128;
  const std::string name = std::string("wgmma_sp.") + (from_registers ? "registers" : "shared") + ".n" +
                           std::to_string(n) + ".selector" + std::to_string(selector) + "." + type +
                           (std::is_same_v<T, int8_t>      ? ""
                            : numbers == Numbers::integers ? ".integers"
                                                           : ".near_one");
  Case c{name, kMetadata + 64 * n, 64 * n, 16, 16, {}, {}, {}, 0};
  c.launch = [](const uint32_t* in, uint32_t* out) {
    return launch(products<T, n, selector, from_registers>, 1, 128, kBaseB + n * 128, nullptr, in, out);
  };
  c.operands = [=](Random& random, Words& in) {
    for (size_t i = 0; i < kOperands; ++i) in.push_back(elements<T>(random, numbers));
    for (int lane = 0; lane < 128; ++lane) {
      const bool asked = sizeof(T) == 1 || lane % 4 / 2 == selector;  // what the others pass must not matter
      in.push_back(asked ? metadata(random) : random.next());
    }
    for (int i = 0; i < 64 * n; ++i)
      in.push_back(std::is_same_v<T, int8_t> ? random.below(2000) - 1000 : sum_before(random, numbers));
  };
  if (!std::is_same_v<T, int8_t> && numbers != Numbers::integers) {
    // of products of e4m3 the tensor cores keep some 14 bits, below the largest
    c.tolerance = sizeof(T) == 1 ? 0x1p-10 : kF32Sum;
    c.magnitude = [=](size_t i, uint32_t word) {
      if (i >= kMetadata) return word & 0x7fffffff;
      return i >= kOperands ? word : word & (sizeof(T) == 1 ? 0x7f7f7f7f : 0x7fff7fff);
    };
  }
  cases.push_back(c);
}

template <class T>
void add_products(std::vector<Case>& cases, const std::string& type) {
  for (const Numbers numbers : {Numbers::integers, Numbers::near_one}) {
    if (std::is_same_v<T, int8_t> && numbers == Numbers::integers) continue;
    add_product<T, 8, 0, false>(cases, type, numbers);
    add_product<T, 8, 0, true>(cases, type, numbers);
  }
  if constexpr (sizeof(T) == 2) {
    add_product<T, 8, 1, false>(cases, type, Numbers::integers);
    add_product<T, 8, 1, true>(cases, type, Numbers::integers);
  }
}

// ---- loads by tensor maps: out of the operands, to `words` words of shared memory

struct At {
  int c[4];
};

__device__ inline uint32_t barrier_behind(uint32_t words) {  // of what a copy fills
  return ptx::shared_address(ptx::dynamic_shared()) + (words * 4 + 7) / 8 * 8;
}

__device__ inline void give_shared(uint32_t words, uint32_t* out) {
  const auto shared = reinterpret_cast<const uint32_t*>(ptx::dynamic_shared());
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) out[i] = shared[i];
}

template <int rank>  // 0: pixels, moved by `offset` along w and h
__global__ void loads(const __grid_constant__ CUtensorMap map, At at, At offset, uint32_t words, uint32_t* out) {
#if SPARSEOPS_SM90A
  const uint32_t to = ptx::shared_address(ptx::dynamic_shared()), bar = barrier_behind(words);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&map);
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(bar, words * 4);
    if constexpr (rank == 2) ptx::tma_load<2>(to, &map, bar, {at.c[0], at.c[1]}, ptx::L2Policy::evict_first);
    if constexpr (rank == 3) ptx::tma_load<3>(to, &map, bar, {at.c[0], at.c[1], at.c[2]}, ptx::L2Policy::evict_first);
    if constexpr (rank == 4)
      ptx::tma_load<4>(to, &map, bar, {at.c[0], at.c[1], at.c[2], at.c[3]}, ptx::L2Policy::evict_first);
    if constexpr (rank == 0)
      ptx::tma_load_im2col(to, &map, bar, {at.c[0], at.c[1], at.c[2], at.c[3]}, static_cast<uint16_t>(offset.c[0]),
                           static_cast<uint16_t>(offset.c[1]));
  }
  __syncthreads();
  ptx::mbarrier_wait(bar, 0);
  give_shared(words, out);
#endif
}

// A tensor of 16-bit elements, innermost dimension first, and a box of it.
struct Tensor {
  std::vector<cuuint64_t> size, strides;
  std::vector<cuuint32_t> box, steps;
  CUtensorMapSwizzle swizzle;

  size_t words() const { return strides.back() * size.back() / 4; }
  uint32_t box_words() const {
    uint32_t elements = 1;
    for (size_t d = 0; d < box.size(); ++d) elements *= (box[d] + steps[d] - 1) / steps[d];
    return elements / 2;
  }
  CUtensorMap map(const void* data) const {
    static const auto encode = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
    CUtensorMap map;
    if (!encode ||
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, static_cast<cuuint32_t>(size.size()), const_cast<void*>(data),
               size.data(), strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
      check(cudaErrorInvalidValue);
    return map;
  }
};

// `pixels` pixels of an NHWC tensor for a filter of 3 x 3 with this stride, padding and dilation.
struct Pixels {
  cuuint64_t channels, width, height, batch;
  cuuint32_t pixels, stride;
  int dilation;
  int pad_h = 1;  // along w it is 1

  size_t words() const { return channels * width * height * batch / 2; }
  CUtensorMapSwizzle swizzle() const { return channels == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B; }
  CUtensorMap map(const void* data) const {
    static const auto encode = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
    const cuuint64_t size[] = {channels, width, height, batch};
    const cuuint64_t strides[] = {channels * 2, width * channels * 2, height * width * channels * 2};
    const cuuint32_t steps[] = {1, stride, stride, 1};
    const int lower[] = {-1, -pad_h}, upper[] = {1 - 2 * dilation, pad_h - 2 * dilation};
    CUtensorMap map;
    if (!encode || encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), size, strides, lower, upper,
                          static_cast<cuuint32_t>(channels), pixels, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle(),
                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
      check(cudaErrorInvalidValue);
    return map;
  }
};

template <int rank, class Map>
void add_load(std::vector<Case>& cases, const char* name, const Map& source, uint32_t words, At at, At offset) {
  Case c{name, source.words(), words, 16, 16, {}, {}, {}, 0};
  c.launch = [=](const uint32_t* in, uint32_t* out) {
    return launch(loads<rank>, 1, 32, words * 4 + 16, nullptr, source.map(in), at, offset, words, out);
  };
  c.operands = [=](Random& random, Words& in) {
    for (size_t i = 0; i < source.words(); ++i) in.push_back(random.next());
  };
  cases.push_back(c);
}

inline void add_loads(std::vector<Case>& cases) {
  const auto matrix = [&](const char* name, CUtensorMapSwizzle swizzle, cuuint32_t row, At at) {
    const Tensor tensor{{72, 9}, {144}, {row, 8}, {1, 1}, swizzle};
    add_load<2>(cases, name, tensor, tensor.box_words(), at, {});
  };
  matrix("tma_load.2d.128b", CU_TENSOR_MAP_SWIZZLE_128B, 64, {{16, 4}});
  matrix("tma_load.2d.64b", CU_TENSOR_MAP_SWIZZLE_64B, 32, {{-8, -2}});
  matrix("tma_load.2d.32b", CU_TENSOR_MAP_SWIZZLE_32B, 16, {{57, 1}});
  matrix("tma_load.2d.none", CU_TENSOR_MAP_SWIZZLE_NONE, 24, {{60, 6}});
  const Tensor cube{{16, 5, 4}, {32, 160}, {16, 4, 2}, {1, 2, 1}, CU_TENSOR_MAP_SWIZZLE_32B};
  add_load<3>(cases, "tma_load.3d.steps", cube, cube.box_words(), {{0, 1, 3}}, {});
  const Tensor four{{16, 3, 3, 2}, {32, 96, 288}, {16, 2, 2, 2}, {1, 1, 1, 1}, CU_TENSOR_MAP_SWIZZLE_NONE};
  add_load<4>(cases, "tma_load.4d", four, four.box_words(), {{-4, 2, -1, 1}}, {});
  // output pixels 30 to 45 of 40, at the last row's second tap; and three to ten of eight, of another geometry
  add_load<0>(cases, "tma_load_im2col.32b", Pixels{16, 5, 4, 2, 16, 1, 1}, 16 * 8, {{0, -1, 1, 1}}, {{1, 2}});
  add_load<0>(cases, "tma_load_im2col.128b.stride", Pixels{64, 4, 3, 2, 8, 2, 1}, 8 * 32, {{0, 1, 1, 0}}, {{0, 1}});
  // another corner along h than along w, which of the two comes first being the question
  add_load<0>(cases, "tma_load_im2col.32b.corners", Pixels{16, 5, 4, 2, 16, 1, 1, 0}, 16 * 8, {{0, -1, 0, 0}},
              {{2, 1}});
  add_load<0>(cases, "tma_load_im2col.32b.dilation", Pixels{16, 6, 5, 1, 16, 1, 2}, 16 * 8, {{0, 0, -1, 0}}, {{4, 2}});
}

// ---- both blocks of a cluster load a half for both, and tell each other when they have read it

template <bool pixels>
__global__ void shared_loads(const __grid_constant__ CUtensorMap map, At first, At second, uint32_t words,
                             uint32_t* out) {
#if SPARSEOPS_SM90A
  const uint32_t rank = ptx::cluster_rank(), half = words / 2;
  const uint32_t to = ptx::shared_address(ptx::dynamic_shared()), full = barrier_behind(words), read = full + 8;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(read, 2);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  ptx::wait_for_predecessor();
  if (threadIdx.x == 0) {
    const At at = rank ? second : first;
    ptx::mbarrier_arrive_expect_tx(full, words * 4);
    if constexpr (pixels) {
      ptx::tma_load_im2col_multicast(to + rank * half * 4, &map, full, {at.c[0], at.c[1], at.c[2], at.c[3]}, 1, 0, 3);
    } else {
      ptx::tma_load_multicast(to + rank * half * 4, &map, full, {at.c[0], at.c[1]}, 3);
    }
  }
  ptx::mbarrier_wait(full, 0);
  give_shared(words, out + rank * (words + 1));
  __syncthreads();
  if (threadIdx.x < 2) ptx::mbarrier_arrive_cluster(read, threadIdx.x);
  ptx::mbarrier_wait(read, 0);
  if (threadIdx.x == 0) out[rank * (words + 1) + words] = rank;
  ptx::let_successor_start();
  ptx::cluster_arrive();
  ptx::cluster_wait();
#endif
}

template <bool pixels, class Map>
void add_shared_load(std::vector<Case>& cases, const char* name, const Map& source, uint32_t words, At first,
                     At second) {
  Case c{name, source.words(), 2 * (words + 1), 16, words + 1, {}, {}, {}, 0};
  c.launch = [=](const uint32_t* in, uint32_t* out) {
    return launch_clusters(shared_loads<pixels>, 2, 32, words * 4 + 24, 2, nullptr, source.map(in), first, second,
                           words, out);
  };
  c.operands = [=](Random& random, Words& in) {
    for (size_t i = 0; i < source.words(); ++i) in.push_back(random.next());
  };
  cases.push_back(c);
}

// ---- stores: transposed matrices, written as a box

// Each warp of four transposes 16 rows of 16 columns and 16 of 8 more; what it makes of 24 words of a thread is a row
// of the box.
__global__ void __launch_bounds__(128) stores(const __grid_constant__ CUtensorMap map, At at, const uint32_t* in) {
#if SPARSEOPS_SM90A
  const uint32_t t = threadIdx.x, lane = t % 32, base = ptx::shared_address(ptx::dynamic_shared());
  uint32_t four[4], two[2];
  for (int i = 0; i < 4; ++i) four[i] = in[t * 6 + i];
  for (int i = 0; i < 2; ++i) two[i] = in[t * 6 + 4 + i];
  // rows of 32 bytes: those of four matrices are 16, of two more 8
  const uint32_t tile = base + t / 32 * 24 * 32;
  ptx::stmatrix<4, true>(tile + lane % 16 * 32 + lane / 16 * 16, four);
  ptx::stmatrix<2, true>(tile + (16 + lane % 8) * 32 + lane / 8 % 2 * 16, two);
  ptx::fence_proxy_async();
  ptx::named_barrier(1, 128);
  if (t / 32 == 2 && ptx::elect_one()) {
    ptx::tma_store(&map, base, {at.c[0], at.c[1]});
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::bulk_wait<0>();
  }
#endif
}

inline void add_store(std::vector<Case>& cases) {
  const Tensor tensor{{24, 90}, {48}, {16, 96}, {1, 1}, CU_TENSOR_MAP_SWIZZLE_NONE};
  for (const auto& [name, at] :
       {std::pair<const char*, At>{"stmatrix.tma_store", {{0, 0}}}, {"stmatrix.tma_store.clipped", {{12, 3}}}}) {
    Case c{name, 128 * 6, tensor.words(), 6, 12, {}, {}, {}, 0};
    c.launch = [=, at = at](const uint32_t* in, uint32_t* out) {
      return launch(stores, 1, 128, 96 * 32, nullptr, tensor.map(out), at, in);
    };
    c.operands = [](Random& random, Words& in) {
      for (int i = 0; i < 128 * 6; ++i) in.push_back(random.next());
    };
    cases.push_back(c);
  }
}

// ---- a warpgroup that copies for two that have its registers

__global__ void __launch_bounds__(384, 1) registers(const uint32_t* in, uint32_t* out) {
#if SPARSEOPS_SM90A
  const uint32_t base = ptx::shared_address(ptx::dynamic_shared()), full = base + 1024, empty = full + 8;
  auto words = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, 256);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::decrease_registers<40>();
    if (threadIdx.x == 0) {
      for (uint32_t round = 0; round < 2; ++round) {
        ptx::mbarrier_wait(empty, round ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, 1024);
        ptx::bulk_load(base, in + round * 256, 1024, full);
      }
    }
  } else {
    ptx::increase_registers<232>();
    const uint32_t t = threadIdx.x - 128;
    for (uint32_t round = 0; round < 2; ++round) {
      ptx::mbarrier_wait(full, round);
      out[round * 256 + t] = words[255 - t];
      ptx::mbarrier_arrive(empty);
    }
  }
#endif
}

inline void add_cases(std::vector<Case>& cases) {
  add_products<__half>(cases, "f16");
  add_products<__nv_bfloat16>(cases, "bf16");
  add_products<__nv_fp8_e4m3>(cases, "e4m3");
  add_products<int8_t>(cases, "s8");
  add_product<__half, 32, 0, false>(cases, "f16", Numbers::integers);
  add_product<int8_t, 32, 0, false>(cases, "s8", Numbers::any);
  add_loads(cases);
  add_shared_load<false>(cases, "tma_load_multicast",
                         Tensor{{64, 17}, {128}, {64, 8}, {1, 1}, CU_TENSOR_MAP_SWIZZLE_128B}, 16 * 32, {{0, 2}},
                         {{0, 12}});
  add_shared_load<true>(cases, "tma_load_im2col_multicast", Pixels{64, 4, 3, 1, 8, 1, 1}, 16 * 32, {{0, -1, -1, 0}},
                        {{0, -1, 1, 0}});
  add_store(cases);
  Case c{"bulk_load.setmaxnreg", 512, 512, 16, 16, {}, {}, {}, 0};
  c.launch = [](const uint32_t* in, uint32_t* out) { return launch(registers, 1, 384, 1040, nullptr, in, out); };
  c.operands = [](Random& random, Words& in) {
    for (int i = 0; i < 512; ++i) in.push_back(random.next());
  };
  cases.push_back(c);
}

// ---- is there a kernel at all

__global__ void compiled(uint32_t* out) { *out = SPARSEOPS_SM90A; }

inline bool is_compiled() {
  uint32_t result = 0;
  void* out;
  check(cudaMalloc(&out, 4));
  check(launch(compiled, 1, 1, 0, nullptr, static_cast<uint32_t*>(out)));
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(&result, out, 4, cudaMemcpyDeviceToHost));
  check(cudaFree(out));
  return result;
}

// ---- an experiment: may the metadata's register change while its instruction is in flight? The documents do not say
// that it may not, and the emulator forbids it.

constexpr int kSteps = 32, kColumns = 256;

// Many steps into the same sums, whose metadata all come by one register.
template <bool wait_each>
__global__ void __launch_bounds__(128) reused(const uint32_t* in, float* out) {
#if SPARSEOPS_SM90A && defined(__CUDACC__)
  const uint32_t t = threadIdx.x, address = ptx::shared_address(ptx::dynamic_shared());
  for (uint32_t i = t; i < (kRowsA + kColumns) * 32; i += 128) put_swizzled(i * 4, in[i]);
  const auto words = reinterpret_cast<uint32_t*>(ptx::dynamic_shared() + (kRowsA + kColumns) * 128);
  for (uint32_t i = t; i < kSteps * 128; i += 128) words[i] = in[(kRowsA + kColumns) * 32 + i];
  ptx::fence_proxy_async();
  __syncthreads();
  const uint64_t a = ptx::descriptor_128b(address), b = ptx::descriptor_128b(address + kBaseB);
  float d[kColumns / 2];
  uint32_t word = words[t];
  ptx::wgmma_fence();
  ptx::wgmma_sp<__half, kColumns>(d, a, b, word, false);
#pragma unroll 1
  for (int step = 1; step < kSteps; ++step) {
    if constexpr (wait_each) {
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
    }
    word = words[step * 128 + t];
    ptx::wgmma_fence();
    ptx::wgmma_sp<__half, kColumns>(d, a, b, word, true);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::keep_in_registers(d);
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) out[t * (kColumns / 2) + i] = d[i];
#endif
}

// One line, which a replay passes over.
inline void print_experiments() {
#if defined(__CUDACC__)
  constexpr size_t kIn = (kRowsA + kColumns) * 32, kSums = 64 * kColumns;
  Random random(99);
  Words in;
  for (size_t i = 0; i < kIn; ++i) in.push_back(pair<__half>(random, Numbers::integers));
  for (int i = 0; i < kSteps * 128; ++i) in.push_back(metadata(random));
  std::array<std::vector<float>, 2> sums = {std::vector<float>(kSums), std::vector<float>(kSums)};
  void *device_in, *device_out;
  check(cudaMalloc(&device_in, in.size() * 4));
  check(cudaMalloc(&device_out, kSums * 4));
  check(cudaMemcpy(device_in, in.data(), in.size() * 4, cudaMemcpyHostToDevice));
  for (const bool wait_each : {false, true}) {
    check(launch(wait_each ? reused<true> : reused<false>, 1, 128, (kIn + kSteps * 128) * 4, nullptr,
                 static_cast<const uint32_t*>(device_in), static_cast<float*>(device_out)));
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(sums[wait_each].data(), device_out, kSums * 4, cudaMemcpyDeviceToHost));
  }
  check(cudaFree(device_in));
  check(cudaFree(device_out));
  size_t differ = 0;
  for (size_t i = 0; i < kSums; ++i) differ += sums[0][i] != sums[1][i];
  std::printf("note wgmma_sp, the register of metadata reused in flight: %zu of %zu sums differ\n", differ, kSums);
#endif
}

}  // namespace conformance::sm90
