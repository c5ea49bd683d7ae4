// What csrc/cuda/ptx.cuh calls where there is no GPU. Each function does what the PTX manual says of the instruction of
// that name, or fails; none guesses.
#pragma once
#include "cuda_emulation.h"
#include "shared_memory.h"

namespace sparseops_emulation {

void cp_async(std::uint32_t dst, const void* src, unsigned bytes, unsigned src_bytes);
void cp_async_commit();
void cp_async_wait(unsigned pending);

void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t row_address, bool transposed);
template <class T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
template <class T>
void mma_sp_m16n8k32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4], std::uint32_t metadata,
                     int selector);
void mma_sp_m16n8k64(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4],
                     std::uint32_t metadata);

std::uint32_t atomic_add_acq_rel(std::uint32_t* counter, std::uint32_t value);
uint4 load_streaming(const void* pointer);

}  // namespace sparseops_emulation
