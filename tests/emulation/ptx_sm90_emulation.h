// What csrc/cuda/ptx_sm90.cuh and wgmma_sp.cuh call where there is no GPU: the instructions that sm_90 and sm_90a brought.
// Each function does what the PTX manual says of the instruction of that name, or fails; none guesses.
#pragma once
#include <cuda.h>

#include "cuda_emulation.h"

namespace sparseops_emulation {

// ---- mbarriers: PTX ISA 9.7.13.15

void mbarrier_init(std::uint32_t bar, std::uint32_t arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(std::uint32_t bar);
void mbarrier_arrive_expect_tx(std::uint32_t bar, std::uint32_t bytes);
void mbarrier_arrive_cluster(std::uint32_t bar, std::uint32_t rank);  // at the same address of block `rank`
void mbarrier_wait(std::uint32_t bar, std::uint32_t parity);          // until the phase of this parity is over

// ---- barriers of a part of the block, and of a cluster: 9.7.13.1, 9.7.13.4

void named_barrier(std::uint32_t id, std::uint32_t threads);
std::uint32_t cluster_rank();
void cluster_arrive();
void cluster_wait();

// ---- bulk copies: 9.7.9.25, 9.7.9.27. Into shared memory: `multicast` is a mask of ranks, 0 for this block alone.

void prefetch_tensormap(const CUtensorMap* map);
void bulk_load(std::uint32_t dst, const void* src, std::uint32_t bytes, std::uint32_t bar);
void tma_load(std::uint32_t dst, const CUtensorMap* map, std::uint32_t bar, const int* at, int rank,
              std::uint16_t multicast);
void tma_load_im2col(std::uint32_t dst, const CUtensorMap* map, std::uint32_t bar, const int (&at)[4],
                     std::uint16_t offset_w, std::uint16_t offset_h, std::uint16_t multicast);
void tma_store(const CUtensorMap* map, std::uint32_t src, const int* at, int rank);
void bulk_commit();
void bulk_wait(unsigned pending);       // for the thread's groups: their writes are done
void bulk_wait_read(unsigned pending);  // their sources may change
void fence_proxy_async();               // fence.proxy.async.shared::cta

// ---- wgmma: 9.7.15. `d` is the thread's accumulators (f32, or s32 for s8), n / 2 of them.

enum class MatrixType { f16, bf16, e4m3, s8 };
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned pending);
// The registers that are passed by reference belong to the instruction until it was waited for.
void wgmma_sp(void* d, int n, MatrixType type, std::uint64_t a, std::uint64_t b, const std::uint32_t& metadata,
              int selector, bool accumulate);
void wgmma_sp_rs(void* d, int n, MatrixType type, const std::uint32_t (&a)[4], std::uint64_t b,
                 const std::uint32_t& metadata, int selector, bool accumulate);

// ---- others

// `count` (1, 2, 4) 8x8 matrices of 16-bit elements, the mirror of ldmatrix: 9.7.14.5.16
void stmatrix(std::uint32_t row_address, const std::uint32_t* r, int count, bool transposed);
bool elect_one();                              // elect.sync of a whole warp
void set_max_registers(int count, bool more);  // setmaxnreg
void griddepcontrol_wait();
void griddepcontrol_launch_dependents();

}  // namespace sparseops_emulation
