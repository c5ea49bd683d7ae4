// Every PTX instruction that the kernels use, one function each: the only file with assembly in it, but for those of
// sm_90 (ptx_sm90.cuh, wgmma_sp.cuh).
//
// Each function has two bodies: the instruction, and, where g++ compiles the kernels for tests on the CPU, its
// emulation (tests/emulation). "lane = 4g + t" is the PTX manual's way to number a warp's lanes; its sections are named
// beside the functions.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "ptx_emulation.h"
#endif

#define SPARSEOPS_DEVICE __device__ __forceinline__

namespace sparseops::ptx {

template <class T>
inline constexpr bool kIsHalf = std::is_same_v<T, __half>;
template <class T>
inline constexpr bool kIs16Bit = kIsHalf<T> || std::is_same_v<T, __nv_bfloat16>;

// ---- shared memory

// The block's dynamic shared memory.
SPARSEOPS_DEVICE unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) unsigned char sparseops_shared[];
  return sparseops_shared;
#else
  return emu::dynamic_shared();
#endif
}

// A pointer into shared memory as the 32-bit address that instructions take.
SPARSEOPS_DEVICE uint32_t shared_address(const void* pointer) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
  return emu::shared_address(pointer);
#endif
}

// ---- copies in the background (cp.async)

// Copies `bytes` to shared memory: the first src_bytes of them from src, the rest are zeros. Both addresses are
// multiples of `bytes`, and src is a valid one even where src_bytes is 0. 16 bytes pass L1 by.
template <int bytes>
SPARSEOPS_DEVICE void cp_async(uint32_t dst, const void* src, uint32_t src_bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(__CUDACC__)
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(bytes), "r"(src_bytes)
                 : "memory");
  }
#else
  emu::cp_async(dst, src, bytes, src_bytes);
#endif
}

// Closes the thread's group of copies; an empty group counts too.
SPARSEOPS_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::cp_async_commit();
#endif
}

// Waits until at most `pending` of the thread's latest groups are under way. What has arrived is seen by this thread;
// by others, after a barrier.
template <int pending>
SPARSEOPS_DEVICE void cp_async_wait() {
  static_assert(pending >= 0);
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  emu::cp_async_wait(pending);
#endif
}

// ---- matrices: PTX ISA 9.7.14.5

// Loads four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, a multiple of 16
// bytes, and gets elements 2t and 2t + 1 of row g of each; of column g, if transposed.
template <bool transposed = false>
SPARSEOPS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
#if defined(__CUDACC__)
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
  }
#else
  emu::ldmatrix_x4(r, row_address, transposed);
#endif
}

// d += a * b, 16x16 times 16x8; T is __half or __nv_bfloat16.
template <class T>
SPARSEOPS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(kIs16Bit<T>);
#if defined(__CUDACC__)
  if constexpr (kIsHalf<T>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  emu::mma_m16n8k16<T>(d, a, b);
#endif
}

// ---- matrices of which a is 2:4 sparse: PTX ISA 9.7.14.6
//
// `ordered_metadata` promises that a group's first index is below its second. Plain mma.sp makes no such demand and
// pays for it from sm_100 on.

// d += a * b, 16x32 times 32x8. Lanes with t = 2 * selector and t = 2 * selector + 1 give the metadata, those of columns
// 0-15 and 16-31: row g in the low half, row g + 8 in the high half. What the other lanes pass does not matter.
template <class T, int selector>
SPARSEOPS_DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                      uint32_t metadata) {
  static_assert(kIs16Bit<T>);
  static_assert(selector == 0 || selector == 1, "ptxas lets 2 and 3 pass, which mean nothing");
#if defined(__CUDACC__)
  if constexpr (kIsHalf<T>) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(selector));
  } else {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(selector));
  }
#else
  emu::mma_sp_m16n8k32<T>(d, a, b, metadata, selector);
#endif
}

// d += a * b of signed bytes, 16x64 times 64x8. Every lane gives metadata: of row g + 8 * (t % 2), columns
// 32 * (t / 2) to + 31.
SPARSEOPS_DEVICE void mma_sp_m16n8k64(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                      uint32_t metadata) {
#if defined(__CUDACC__)
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
#else
  emu::mma_sp_m16n8k64(d, a, b, metadata);
#endif
}

// ---- global memory

// Adds to a counter that blocks share and returns its old value. What the caller did or knows of before is seen by
// whoever adds later and gets to see this addition: with a barrier on both sides, all of one block by all of the other.
SPARSEOPS_DEVICE uint32_t atomic_add_acq_rel(uint32_t* counter, uint32_t value) {
#if defined(__CUDACC__)
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
  return old;
#else
  return emu::atomic_add_acq_rel(counter, value);
#endif
}

// 16 bytes that are read once, past L1. Nothing may write them while the kernel runs.
SPARSEOPS_DEVICE uint4 load_streaming(const void* pointer) {
#if defined(__CUDACC__)
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
#else
  return emu::load_streaming(pointer);
#endif
}

}  // namespace sparseops::ptx
