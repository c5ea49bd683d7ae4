// What wgmma.mma_async.sp computes: operands out of shared memory by their descriptors, metadata, the product.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ptx_sm90_emulation.h"

namespace sparseops_emulation {

// An instruction takes 64 rows of 32 bytes, the kept values, and n rows of 64 bytes, the activations' columns: for
// elements of any size.
inline constexpr int kWgmmaRows = 64, kMostColumns = 256;
inline constexpr int kKeptBytes = 32, kDepthBytes = 64;

// An operand in shared memory with the depth running along its rows: PTX ISA 9.7.15.5.1.2.
class SharedOperand {
 public:
  SharedOperand() = default;
  // Fails for what a descriptor of `rows` rows of `bytes` bytes cannot say, or says and is not emulated.
  SharedOperand(std::uint64_t descriptor, int rows, int bytes, const char* name);

  // The 16 bytes from `byte` on of a row.
  const std::byte* chunk(int row, int byte) const { return origin_ + (address(row, byte) - least_); }

 private:
  std::uint32_t address(int row, int byte) const;

  std::uint32_t start_ = 0, leading_ = 0, stride_ = 0, span_ = 0;
  std::uint32_t least_ = 0;
  const std::byte* origin_ = nullptr;  // of address `least_`
};

// Which column of the depth each kept value stands for.
using Columns = std::uint8_t[kWgmmaRows][kKeptBytes];
// From the words of a warpgroup's 128 lanes; fails for a group whose two columns do not rise.
void decode_metadata(const std::uint32_t* words, MatrixType type, int selector, Columns& columns);

using Kept = std::byte[kWgmmaRows][kKeptBytes];
// The kept values that a thread of the warpgroup has in its four registers.
void place_fragment(int thread, const std::uint32_t* registers, Kept& kept);

// product[i][j] = sum over k of a[i][columns[i][k]] * b[j][..]. Sums of bytes are exact. Others are sums of exact
// products in f32; the tensor cores keep fewer bits of e4m3's, by an amount that no document tells.
void multiply(MatrixType type, const Kept& a, const Columns& columns, const std::byte (*b)[kDepthBytes], int n,
              float (*product)[kMostColumns]);

// Where register i of a thread's accumulators is in the product.
inline int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace sparseops_emulation
