// wgmma.mma_async.sp: the product of a warpgroup's 64 rows of a 2:4 weight with n columns, in the background. PTX ISA
// 9.7.15.
//
//   wgmma_fence();  wgmma_sp<T, n>(...) as often as wanted;  wgmma_commit();  ...  wgmma_wait<pending>();
//
// Warp w of the warpgroup has rows 16w to 16w + 15. Of each 8 columns 8j + .. it holds in d[4j] to d[4j + 3] rows g, g,
// g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1, where the lane is 4g + t. A step is 32 columns of the weight for
// 16-bit elements and 64 for 8-bit ones: always 32 bytes of kept values and 64 bytes of activations a row.
#pragma once
#include <cuda_fp8.h>

#include "cuda/ptx_sm90.cuh"

namespace sparseops::ptx {

template <class T>
inline constexpr bool kIs8Bit = std::is_same_v<T, int8_t> || std::is_same_v<T, __nv_fp8_e4m3>;
template <class T>
using sum_t = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

#if !defined(__CUDACC__)
template <class T>
inline constexpr emu::MatrixType kMatrixType = std::is_same_v<T, __half>          ? emu::MatrixType::f16
                                               : std::is_same_v<T, __nv_bfloat16> ? emu::MatrixType::bf16
                                               : std::is_same_v<T, int8_t>        ? emu::MatrixType::s8
                                                                                  : emu::MatrixType::e4m3;
#endif

// An operand in shared memory: rows of 128 bytes, whose 16-byte chunks are exchanged as the copy engine does with
// CU_TENSOR_MAP_SWIZZLE_128B; eight rows are 1024 bytes and begin at a multiple of them. 32 bytes further along the
// rows is 2 more.
SPARSEOPS_DEVICE uint64_t descriptor_128b(uint32_t address) {
  constexpr uint64_t kSwizzle128B = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32, kUnused = 1 << 16;
  return kSwizzle128B | kEightRows | kUnused | (address & 0x3ffff) >> 4;
}

// Orders accesses to accumulators and operands in registers before the multiplications that follow.
SPARSEOPS_DEVICE void wgmma_fence() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emu::wgmma_fence();
#endif
}

SPARSEOPS_DEVICE void wgmma_commit() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emu::wgmma_commit();
#endif
}

// Waits until all but the latest `pending` groups are done: their accumulators may be read, their operands change.
template <int pending>
SPARSEOPS_DEVICE void wgmma_wait() {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#else
  emu::wgmma_wait(pending);
#endif
}

// Tells the compiler, which does not know when wgmma writes, that these registers have other values from here on.
template <class acc_t, int count>
SPARSEOPS_DEVICE void keep_in_registers([[maybe_unused]] acc_t (&d)[count]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<acc_t, float>) {
      asm volatile("" : "+f"(d[i])::"memory");
    } else {
      asm volatile("" : "+r"(d[i])::"memory");
    }
  }
#endif
}

#if defined(__CUDACC__)
// The text and the operands of one instruction, for 4 to 128 sums of a thread.
#define SPARSEOPS_D4 "%0, %1, %2, %3"
#define SPARSEOPS_D8 \
  SPARSEOPS_D4       \
  ", %4, %5, %6, %7"
#define SPARSEOPS_D16 \
  SPARSEOPS_D8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SPARSEOPS_D32 \
  SPARSEOPS_D16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPARSEOPS_D64                                                                          \
  SPARSEOPS_D32                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49" \
  ", %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARSEOPS_D96                                                                \
  SPARSEOPS_D64                                                                      \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SPARSEOPS_D128                                                                                           \
  SPARSEOPS_D64                                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81"                   \
  ", %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99"                   \
  ", %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117" \
  ", %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SPARSEOPS_SUMS4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define SPARSEOPS_SUMS8(c, i) SPARSEOPS_SUMS4(c, i), SPARSEOPS_SUMS4(c, i + 4)
#define SPARSEOPS_SUMS16(c, i) SPARSEOPS_SUMS8(c, i), SPARSEOPS_SUMS8(c, i + 8)
#define SPARSEOPS_SUMS32(c, i) SPARSEOPS_SUMS16(c, i), SPARSEOPS_SUMS16(c, i + 16)
#define SPARSEOPS_SUMS64(c, i) SPARSEOPS_SUMS32(c, i), SPARSEOPS_SUMS32(c, i + 32)
#define SPARSEOPS_SUMS96(c, i) SPARSEOPS_SUMS64(c, i), SPARSEOPS_SUMS32(c, i + 64)
#define SPARSEOPS_SUMS128(c, i) SPARSEOPS_SUMS64(c, i), SPARSEOPS_SUMS64(c, i + 64)

// The operands behind `count` sums: a (a descriptor, or four registers), b, metadata and its selector; then the number
// of the one that says whether to add.
#define SPARSEOPS_SS4 "%4, %5, %6, %7", "%8"
#define SPARSEOPS_SS8 "%8, %9, %10, %11", "%12"
#define SPARSEOPS_SS16 "%16, %17, %18, %19", "%20"
#define SPARSEOPS_SS32 "%32, %33, %34, %35", "%36"
#define SPARSEOPS_SS64 "%64, %65, %66, %67", "%68"
#define SPARSEOPS_SS96 "%96, %97, %98, %99", "%100"
#define SPARSEOPS_SS128 "%128, %129, %130, %131", "%132"
#define SPARSEOPS_RS4 "{%4, %5, %6, %7}, %8, %9, %10", "%11"
#define SPARSEOPS_RS8 "{%8, %9, %10, %11}, %12, %13, %14", "%15"
#define SPARSEOPS_RS16 "{%16, %17, %18, %19}, %20, %21, %22", "%23"
#define SPARSEOPS_RS32 "{%32, %33, %34, %35}, %36, %37, %38", "%39"
#define SPARSEOPS_RS64 "{%64, %65, %66, %67}, %68, %69, %70", "%71"
#define SPARSEOPS_RS96 "{%96, %97, %98, %99}, %100, %101, %102", "%103"
#define SPARSEOPS_RS128 "{%128, %129, %130, %131}, %132, %133, %134", "%135"

#define SPARSEOPS_WGMMA_TEXT(shape, sums, operands, add, tail) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add                      \
  ", 0;\n"                                                     \
  "wgmma.mma_async.sp.sync.aligned." shape " {" sums "}, " operands ", p" tail ";\n}"
// A macro's macros are expanded before it is called: `operands` brings two arguments.
#define SPARSEOPS_WGMMA_EXPAND(...) SPARSEOPS_WGMMA_TEXT(__VA_ARGS__)
#define SPARSEOPS_WGMMA_SS(n, count, types, c, tail)                                                  \
  asm volatile(SPARSEOPS_WGMMA_EXPAND("m64n" #n types, SPARSEOPS_D##count, SPARSEOPS_SS##count, tail) \
               : SPARSEOPS_SUMS##count(c, 0)                                                          \
               : "l"(a), "l"(b), "r"(metadata), "n"(selector), "r"(static_cast<int>(accumulate))      \
               : "memory")
#define SPARSEOPS_WGMMA_RS(n, count, types, c, tail)                                                  \
  asm volatile(SPARSEOPS_WGMMA_EXPAND("m64n" #n types, SPARSEOPS_D##count, SPARSEOPS_RS##count, tail) \
               : SPARSEOPS_SUMS##count(c, 0)                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(selector),    \
                 "r"(static_cast<int>(accumulate))                                                    \
               : "memory")
// By the type of the elements, f16 and bf16 with `tail`.
#define SPARSEOPS_WGMMA(form, n, count, tail)                              \
  if constexpr (kIsHalf<T>) {                                              \
    SPARSEOPS_WGMMA_##form(n, count, "k32.f32.f16.f16", "+f", tail);       \
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {                 \
    SPARSEOPS_WGMMA_##form(n, count, "k32.f32.bf16.bf16", "+f", tail);     \
  } else if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {                 \
    SPARSEOPS_WGMMA_##form(n, count, "k64.f32.e4m3.e4m3", "+f", ", 1, 1"); \
  } else {                                                                 \
    SPARSEOPS_WGMMA_##form(n, count, "k64.s32.s8.s8", "+r", "");           \
  }
#define SPARSEOPS_WGMMA_BY_WIDTH(form, tail) \
  if constexpr (n == 8) {                    \
    SPARSEOPS_WGMMA(form, 8, 4, tail)        \
  } else if constexpr (n == 16) {            \
    SPARSEOPS_WGMMA(form, 16, 8, tail)       \
  } else if constexpr (n == 32) {            \
    SPARSEOPS_WGMMA(form, 32, 16, tail)      \
  } else if constexpr (n == 64) {            \
    SPARSEOPS_WGMMA(form, 64, 32, tail)      \
  } else if constexpr (n == 128) {           \
    SPARSEOPS_WGMMA(form, 128, 64, tail)     \
  } else if constexpr (n == 192) {           \
    SPARSEOPS_WGMMA(form, 192, 96, tail)     \
  } else {                                   \
    SPARSEOPS_WGMMA(form, 256, 128, tail)    \
  }
#endif

template <class T, int n, int selector>
inline constexpr bool kIsWgmma = (n == 8 || n == 16 || n == 32 || n == 64 || n == 128 || n == 192 || n == 256) &&
                                 (selector == 0 || (selector == 1 && !kIs8Bit<T>));

// d = a * b, or d += a * b, of one step; a and b by descriptor_128b. The metadata is that of mma.sp (ptx.cuh): with
// 16-bit elements the lanes with t = 2 * selector and 2 * selector + 1 give it, with 8-bit ones all do. Registers that
// are passed belong to the instruction until it was waited for.
template <class T, int n, int selector = 0>
SPARSEOPS_DEVICE void wgmma_sp(sum_t<T> (&d)[n / 2], uint64_t a, uint64_t b, const uint32_t& metadata,
                               bool accumulate) {
  static_assert(kIsWgmma<T, n, selector>);
#if defined(__CUDACC__)
  SPARSEOPS_WGMMA_BY_WIDTH(SS, ", 1, 1, 0, 0")
#else
  emu::wgmma_sp(d, n, kMatrixType<T>, a, b, metadata, selector, accumulate);
#endif
}

// The same with the kept values in registers, as mma.sp wants them: register r has row g + 8 (r % 2), kept columns 2t
// and 2t + 1 (8-bit: 4t to 4t + 3) of the r / 2-th half.
template <class T, int n, int selector = 0>
SPARSEOPS_DEVICE void wgmma_sp(sum_t<T> (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, const uint32_t& metadata,
                               bool accumulate) {
  static_assert(kIsWgmma<T, n, selector>);
#if defined(__CUDACC__)
  SPARSEOPS_WGMMA_BY_WIDTH(RS, ", 1, 1, 0")
#else
  emu::wgmma_sp_rs(d, n, kMatrixType<T>, a, b, metadata, selector, accumulate);
#endif
}

}  // namespace sparseops::ptx
