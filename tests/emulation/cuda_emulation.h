// CUDA C++ for g++, in tests only: what nvcc gives a kernel without being asked.
//
// A kernel compiled with this header becomes an ordinary function; launch() calls it once for each CUDA thread. Types
// and __global__, __device__, __forceinline__ come from CUDA's own headers, which g++ understands.
#pragma once
#if defined(__CUDACC__)
#error "cuda_emulation.h stands in for nvcc"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <tuple>
#include <type_traits>

#include "memory_check.h"

// Blocks do not overlap in time, so one copy of a variable serves them all (those of a cluster do, and may have none). thread_local puts those of all kernels side
// by side, where they can be poisoned and watched; AddressSanitizer guards the ends of plain ones only.
#undef __shared__
#if defined(EMU_SHARED_VARIABLES_KNOWN)
#define __shared__ static thread_local
#else
#define __shared__ static
#endif
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// The built-in variables of the running thread.
extern dim3 gridDim, blockDim;
extern uint3 blockIdx, threadIdx;
inline constexpr int warpSize = 32;

namespace sparseops_emulation {

// Runs a grid, its blocks in clusters along x; throws Error.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, unsigned cluster, const std::function<void()>& thread);
// The same for host code that expects CUDA's ways: an error code, of which cudaGetErrorString knows the text.
cudaError_t launch_grid(dim3 grid, dim3 block, std::size_t shared_bytes, unsigned cluster,
                        const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
void run_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, unsigned cluster,
                 const Arguments&... arguments) {
  const std::tuple<Parameters...> parameters(arguments...);
  run_grid(grid, block, shared_bytes, cluster, [&] { std::apply(kernel, parameters); });
}

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
         const Arguments&... arguments) {
  run_cluster(kernel, grid, block, shared_bytes, 1, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                           unsigned cluster, const Arguments&... arguments) {
  const std::tuple<Parameters...> parameters(arguments...);
  return launch_grid(grid, block, shared_bytes, cluster, [&] { std::apply(kernel, parameters); });
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   const Arguments&... arguments) {
  return launch_cluster(kernel, grid, block, shared_bytes, 1, arguments...);
}

// ---- behind the functions below

enum class Shuffle { index, down, up, exclusive_or };
void shuffle(Shuffle kind, std::uint32_t mask, void* value, std::size_t bytes, int operand, int width);
void load(void* to, const void* from, std::size_t bytes, memory::Access access);
void store(void* to, const void* from, std::size_t bytes);
void relaxed_atomic(const void* address, std::size_t bytes, const void* site);
[[noreturn]] void trap();

}  // namespace sparseops_emulation

namespace emu = sparseops_emulation;

// ---- functions that a kernel calls without including anything
//
// Those that note where they were called from are real calls, which the macros see to.

#define EMU_SITE __builtin_return_address(0)
#define EMU_INLINE [[gnu::always_inline]] inline

void __syncthreads();
int __syncthreads_count(int predicate);
int __syncthreads_and(int predicate);
int __syncthreads_or(int predicate);
void __syncwarp(unsigned mask = ~0u);
unsigned __ballot_sync(unsigned mask, int predicate);
int __any_sync(unsigned mask, int predicate);
int __all_sync(unsigned mask, int predicate);
void __threadfence();
inline void __threadfence_block() {}  // fibers see each other's stores at once; only barriers order them for the check
inline void __nanosleep(unsigned) {}
inline void __trap() { emu::trap(); }

template <class T>
EMU_INLINE T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  emu::shuffle(emu::Shuffle::index, mask, &v, sizeof v, lane, width);
  return v;
}
template <class T>
EMU_INLINE T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  emu::shuffle(emu::Shuffle::down, mask, &v, sizeof v, static_cast<int>(by), width);
  return v;
}
template <class T>
EMU_INLINE T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
  emu::shuffle(emu::Shuffle::up, mask, &v, sizeof v, static_cast<int>(by), width);
  return v;
}
template <class T>
EMU_INLINE T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  emu::shuffle(emu::Shuffle::exclusive_or, mask, &v, sizeof v, bits, width);
  return v;
}

#define EMU_LOAD(name, access)                 \
  template <class T>                           \
  EMU_INLINE T name(const T* p) {              \
    alignas(T) unsigned char bytes[sizeof(T)]; \
    emu::load(bytes, p, sizeof(T), access);    \
    return *reinterpret_cast<const T*>(bytes); \
  }
EMU_LOAD(__ldg, emu::memory::Access::read_only)
EMU_LOAD(__ldca, emu::memory::Access::read)
EMU_LOAD(__ldcg, emu::memory::Access::read)
EMU_LOAD(__ldcs, emu::memory::Access::read)
#undef EMU_LOAD
#define EMU_STORE(name)                                   \
  template <class T>                                      \
  EMU_INLINE void name(T* p, std::type_identity_t<T> v) { \
    emu::store(p, &v, sizeof v);                          \
  }
EMU_STORE(__stcg)
EMU_STORE(__stcs)
EMU_STORE(__stwb)
EMU_STORE(__stwt)
#undef EMU_STORE

// Fibers change places only where they wait: plain arithmetic is atomic, and relaxed, as CUDA's atomics are.
#define EMU_ATOMIC(name, result)                                                       \
  template <class T>                                                                   \
  [[gnu::noinline, gnu::no_sanitize_thread]] T name(T* p, std::type_identity_t<T> v) { \
    emu::relaxed_atomic(p, sizeof(T), EMU_SITE);                                       \
    const T old = *p;                                                                  \
    *p = result;                                                                       \
    return old;                                                                        \
  }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicMax, std::max(old, v))
EMU_ATOMIC(atomicMin, std::min(old, v))
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicAnd, old& v)
EMU_ATOMIC(atomicExch, v)
#undef EMU_ATOMIC
template <class T>
[[gnu::noinline, gnu::no_sanitize_thread]] T atomicCAS(T* p, std::type_identity_t<T> expected,
                                                       std::type_identity_t<T> v) {
  emu::relaxed_atomic(p, sizeof(T), EMU_SITE);
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}

using std::max;
using std::min;
EMU_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
EMU_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMU_INLINE int __ffs(int x) { return __builtin_ffs(x); }
EMU_INLINE int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
EMU_INLINE unsigned __byte_perm(unsigned x, unsigned y, unsigned selectors) {
  const std::uint64_t bytes = std::uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selectors >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
EMU_INLINE float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
EMU_INLINE float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
EMU_INLINE unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
EMU_INLINE int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
EMU_INLINE float __int2float_rn(int x) { return static_cast<float>(x); }
EMU_INLINE int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
EMU_INLINE float __expf(float x) { return expf(x); }
EMU_INLINE float __logf(float x) { return logf(x); }
EMU_INLINE float __fdividef(float x, float y) { return x / y; }
EMU_INLINE float __frcp_rn(float x) { return 1 / x; }
EMU_INLINE float __fmul_rn(float x, float y) { return x * y; }
EMU_INLINE float __fadd_rn(float x, float y) { return x + y; }
EMU_INLINE float rsqrtf(float x) { return 1 / sqrtf(x); }
