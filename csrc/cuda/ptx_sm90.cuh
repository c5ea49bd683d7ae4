// The PTX instructions of sm_90 and sm_90a that the kernels use, one function each, as in ptx.cuh; those of the tensor
// cores are in wgmma_sp.cuh. Besides these three files nothing holds assembly.
//
// Shared addresses are those of the own block unless said otherwise. A cluster's blocks have the same layout, so an
// address names the same place in each of them.
#pragma once
#include <cuda.h>

#include "cuda/ptx.cuh"

#if !defined(__CUDACC__)
#include "ptx_sm90_emulation.h"
#endif

// A kernel's body is compiled where this is 1: for the host, for the emulator, and for sm_90a. A build without sm_90a
// still links the host side.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPARSEOPS_SM90A 1
#else
#define SPARSEOPS_SM90A 0
#endif

namespace sparseops::ptx {

// ---- mbarriers: PTX ISA 9.7.13.15
//
// A phase ends when as many arrivals came as the barrier was made for, and as many bytes as they announced.

SPARSEOPS_DEVICE void mbarrier_init(uint32_t bar, uint32_t arrivals) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
#else
  emu::mbarrier_init(bar, arrivals);
#endif
}

// Makes the thread's initialised mbarriers known to the copy engine and, after a barrier, to the cluster.
SPARSEOPS_DEVICE void fence_mbarrier_init() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emu::fence_mbarrier_init();
#endif
}

SPARSEOPS_DEVICE void mbarrier_arrive(uint32_t bar) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
#else
  emu::mbarrier_arrive(bar);
#endif
}

// Arrives, and announces bytes that copies will bring in this phase.
SPARSEOPS_DEVICE void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
#else
  emu::mbarrier_arrive_expect_tx(bar, bytes);
#endif
}

// Arrives at the mbarrier of block `rank` of the cluster, which may be the own one. Said without `.release.cluster`,
// which is the default and, written out, costs a fence of the whole GPU.
SPARSEOPS_DEVICE void mbarrier_arrive_cluster(uint32_t bar, uint32_t rank) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar),
      "r"(rank)
      : "memory");
#else
  emu::mbarrier_arrive_cluster(bar, rank);
#endif
}

// Waits until the phase of this parity is over: that of parity 0 is the first. Parity 1 at once, at the beginning.
SPARSEOPS_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
#else
  emu::mbarrier_wait(bar, parity);
#endif
}

// ---- barriers of some of a block's warps, and of a cluster: 9.7.13.1, 9.7.13.4

// Barrier `id`, 1 to 15, of `threads` threads, which are whole warps.
SPARSEOPS_DEVICE void named_barrier(uint32_t id, uint32_t threads) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::named_barrier(id, threads);
#endif
}

SPARSEOPS_DEVICE uint32_t cluster_rank() {
#if defined(__CUDACC__)
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return emu::cluster_rank();
#endif
}

// What a thread did before it arrives is seen by all threads of the cluster after they have waited.
SPARSEOPS_DEVICE void cluster_arrive() {
#if defined(__CUDACC__)
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  emu::cluster_arrive();
#endif
}

SPARSEOPS_DEVICE void cluster_wait() {
#if defined(__CUDACC__)
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  emu::cluster_wait();
#endif
}

// ---- copies by the copy engine: 9.7.9.25, 9.7.9.27. Their bytes count towards an mbarrier.

SPARSEOPS_DEVICE void prefetch_tensormap(const CUtensorMap* map) {
#if defined(__CUDACC__)
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  emu::prefetch_tensormap(map);
#endif
}

// Copies `bytes`, a multiple of 16, as are both addresses.
SPARSEOPS_DEVICE void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(bar)
               : "memory");
#else
  emu::bulk_load(dst, src, bytes, bar);
#endif
}

// How long the L2 cache should keep what a copy reads: policies as createpolicy.fractional makes them for all of it.
enum class L2Policy : uint64_t { normal = 0x16f0000000000000, evict_first = 0x12f0000000000000 };

// The box that begins at `at` of a tensor of `rank` dimensions; what lies outside the tensor is zero.
template <int rank>
SPARSEOPS_DEVICE void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int (&at)[rank],
                               L2Policy policy) {
  static_assert(rank == 2 || rank == 3 || rank == 4);
#if defined(__CUDACC__)
  const auto l2 = static_cast<uint64_t>(policy);
  if constexpr (rank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
        "l"(map), "r"(at[0]), "r"(at[1]), "r"(bar), "l"(l2)
        : "memory");
  } else if constexpr (rank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(dst),
        "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(bar), "l"(l2)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(dst),
        "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(bar), "l"(l2)
        : "memory");
  }
#else
  static_cast<void>(policy);
  emu::tma_load(dst, map, bar, at, rank, 0);
#endif
}

// The same into the blocks of the cluster that `ranks` has a bit for: to the same place, and counted by the mbarrier
// there, in each.
SPARSEOPS_DEVICE void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int (&at)[2],
                                         uint16_t ranks) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
      "l"(map), "r"(at[0]), "r"(at[1]), "r"(bar), "h"(ranks)
      : "memory");
#else
  emu::tma_load(dst, map, bar, at, 2, ranks);
#endif
}

// Pixels of an NHWC tensor, one behind the other along w, h, n within the map's corners, the first of them at
// `at` = {c, w, h, n}; each moved by the offset of a filter tap. Outside the tensor is zero.
SPARSEOPS_DEVICE void tma_load_im2col(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int (&at)[4],
                                      uint16_t offset_w, uint16_t offset_h) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(dst),
      "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(bar), "h"(offset_w), "h"(offset_h)
      : "memory");
#else
  emu::tma_load_im2col(dst, map, bar, at, offset_w, offset_h, 0);
#endif
}

SPARSEOPS_DEVICE void tma_load_im2col_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int (&at)[4],
                                                uint16_t offset_w, uint16_t offset_h, uint16_t ranks) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8}, %9;" ::"r"(dst),
      "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(bar), "h"(offset_w), "h"(offset_h), "h"(ranks)
      : "memory");
#else
  emu::tma_load_im2col(dst, map, bar, at, offset_w, offset_h, ranks);
#endif
}

// Writes a box; what lies outside the tensor is left out. Counts towards the thread's open group.
SPARSEOPS_DEVICE void tma_store(const CUtensorMap* map, uint32_t src, const int (&at)[2]) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(at[0]),
               "r"(at[1]), "r"(src)
               : "memory");
#else
  emu::tma_store(map, src, at, 2);
#endif
}

SPARSEOPS_DEVICE void bulk_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  emu::bulk_commit();
#endif
}

// Waits until all but the thread's latest `pending` groups are written.
template <int pending>
SPARSEOPS_DEVICE void bulk_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
#else
  emu::bulk_wait(pending);
#endif
}

// Waits until all but the thread's latest `pending` groups have read what they write: their source may change.
template <int pending>
SPARSEOPS_DEVICE void bulk_wait_read() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
#else
  emu::bulk_wait_read(pending);
#endif
}

// Orders the thread's plain accesses to shared memory before later ones by the copy engine and the tensor cores, its
// own and, after a barrier, others'.
SPARSEOPS_DEVICE void fence_proxy_async() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emu::fence_proxy_async();
#endif
}

// ---- others

// Stores `count` 8x8 matrices of 16-bit elements, the mirror of ldmatrix_x4: lane l gives the address of row l % 8 of
// matrix l / 8. Transposed, a thread's two elements of row g go to column g.
template <int count, bool transposed>
SPARSEOPS_DEVICE void stmatrix(uint32_t row_address, const uint32_t (&r)[count]) {
  static_assert(transposed && (count == 2 || count == 4));
#if defined(__CUDACC__)
  if constexpr (count == 4) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row_address), "r"(r[0]),
                 "r"(r[1])
                 : "memory");
  }
#else
  emu::stmatrix(row_address, r, count, transposed);
#endif
}

// True for one lane of a whole warp.
SPARSEOPS_DEVICE bool elect_one() {
#if defined(__CUDACC__)
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(elected));
  return elected;
#else
  return emu::elect_one();
#endif
}

// Gives registers back to the block's pool, or takes them from it: `count` to a thread of the warpgroup from here on.
template <int count>
SPARSEOPS_DEVICE void decrease_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#else
  emu::set_max_registers(count, false);
#endif
}
template <int count>
SPARSEOPS_DEVICE void increase_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#else
  emu::set_max_registers(count, true);
#endif
}

// Where the kernel was allowed to start before its predecessor in the stream has ended: waits for that end.
SPARSEOPS_DEVICE void wait_for_predecessor() {
#if defined(__CUDACC__)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#else
  emu::griddepcontrol_wait();
#endif
}

// From here on a successor that waits for this kernel may take its place on the multiprocessors.
SPARSEOPS_DEVICE void let_successor_start() {
#if defined(__CUDACC__)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#else
  emu::griddepcontrol_launch_dependents();
#endif
}

}  // namespace sparseops::ptx
