// The gradient of a 2:4 weight's kept values: the dense gradient grad^T x, of which only what the pattern keeps is
// written. It is a dense product, tokens being the reduced dimension: no multiplication can be left out before the
// columns are known, and mma.sp takes its pattern from an operand.
//
//   grad_values[m, j] = sum_t grad[t, m] * x[t, k], k the column of value j; 0 where k >= in_features
//
//   grad [tokens, rows], x [tokens, in_features]; f16, bf16; each row begins at a multiple of 16 bytes, and may be read
//                        up to one
//   meta [rows, cols/8], grad_values [rows, cols/2] of the type of x; the order of formats/nm24.py
//
// A block computes kFeatures x kColumns of the dense gradient. Both operands have tokens outermost, so both are read
// from shared memory transposed. At the end the sums lie in shared memory, a thread picks two of each four, rounds once
// and stores them next to its neighbour's.
//
// Operations: tokens * rows * cols multiply-adds. Bytes: 2 * tokens * rows for each column of tiles, 2 * tokens * cols
// for each row of them, and 1.125 * rows * cols. Bound for many tokens: the tensor cores. A step of 16 tokens of the
// large tile takes an A100 256 clocks of mma and, at 128 bytes a clock, 192 of shared memory: 8 KB written, 16 KB read.
// State: it has not yet run on a GPU; tests/emulation runs it on the CPU.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"
#include "ops.h"

namespace sparseops {

template <class element_t_, int kFeatures_, int kColumns_, int kStages_>
struct NM24GradValuesTile {
  using element_t = element_t_;
  static constexpr int kFeatures = kFeatures_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kWarpFeatures = kFeatures / 2, kWarpColumns = kColumns / 2, kThreads = 128;  // 2 x 2 warps
  static constexpr int kRowTiles = kWarpFeatures / 16, kColumnTiles = kWarpColumns / 8;  // of a warp, in instructions
  static constexpr int kDepth = 32;                                                      // tokens of a step

  static constexpr int kXAt = kDepth * kFeatures * 2, kStageBytes = kXAt + kDepth * kColumns * 2;
  // In a store of fragments eight lanes lie along features and four along pairs of columns; with the 8 a half-warp hits
  // 32 different banks.
  static constexpr int kPitch = kColumns + 8;
  static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kFeatures * kPitch * 4);

  static_assert(sizeof(element_t) == 2, "mma m16n8k16");
  static_assert(kRowTiles * 16 == kWarpFeatures && kColumnTiles % 2 == 0, "an ldmatrix loads 16 features or columns");
  static_assert(kFeatures % 64 == 0 && kColumns % 64 == 0, "chunks change places among eight");
  static_assert(kDepth * kFeatures / 8 % kThreads == 0 && kDepth * kColumns / 8 % kThreads == 0);
};

template <class element_t>
using LargeGradTile = NM24GradValuesTile<element_t, 128, 128, 4>;
template <class element_t>
using SmallGradTile = NM24GradValuesTile<element_t, 64, 64, 4>;

// Where 16-byte chunk `chunk` of a token lies, in rows of kWidth elements. The same chunk of eight tokens, which is what
// an ldmatrix reads, lies in eight different places.
template <int kWidth>
SPARSEOPS_DEVICE uint32_t chunk_at(int token, int chunk) {
  return token * (kWidth * 2) + (chunk ^ (token % 8)) * 16;
}

// Copies kWidth neighbouring elements of kDepth tokens at a time: of grad the block's features, of x its columns. What is
// past the last token, or in a chunk past the end of a row, becomes zero.
template <class Tile, int kWidth>
struct TokenRows {
  const typename Tile::element_t* matrix;
  int64_t stride, tokens, width;
  int first;  // element of a row

  SPARSEOPS_DEVICE void load(uint32_t to, int step) const {
    constexpr int kChunks = kWidth / 8, kTokens = Tile::kThreads / kChunks;  // tokens: copied at once
    const int chunk = threadIdx.x % kChunks, element = first + chunk * 8;
#pragma unroll
    for (int i = 0; i < Tile::kDepth / kTokens; ++i) {
      const int within = threadIdx.x / kChunks + i * kTokens;
      const int64_t token = int64_t(step) * Tile::kDepth + within;
      const bool inside = token < tokens && element < width;
      ptx::cp_async<16>(to + chunk_at<kWidth>(within, chunk), inside ? matrix + token * stride + element : matrix,
                        inside ? 16 : 0);
    }
  }
};

// Adds the product of a step's tokens to a warp's sums. Of both operands an ldmatrix loads 16 tokens by 16 features or
// columns: the left one's fragments have features before tokens, the right one's tokens before columns.
template <class Tile>
SPARSEOPS_DEVICE void multiply_step(Fragment<float> (&sums)[Tile::kRowTiles][Tile::kColumnTiles], uint32_t stage,
                                    int warp_feature, int warp_column) {
  const int lane = threadIdx.x % 32, row = lane % 8, low = lane / 8 % 2, high = lane / 16;
#pragma unroll
  for (int token = 0; token < Tile::kDepth; token += 16) {
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m)
      ptx::ldmatrix_x4<true>(a[m],
                             stage + chunk_at<Tile::kFeatures>(token + high * 8 + row, warp_feature / 8 + m * 2 + low));
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4<true>(
          b, stage + Tile::kXAt + chunk_at<Tile::kColumns>(token + low * 8 + row, warp_column / 8 + n + high));
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        ptx::mma_m16n8k16<typename Tile::element_t>(sums[m][n].sum, a[m], {b[0], b[1]});
        ptx::mma_m16n8k16<typename Tile::element_t>(sums[m][n + 1].sum, a[m], {b[2], b[3]});
      }
    }
  }
}

// A warp's sums over all tokens.
template <class Tile>
SPARSEOPS_DEVICE void multiply_tokens(Fragment<float> (&sums)[Tile::kRowTiles][Tile::kColumnTiles],
                                      const TokenRows<Tile, Tile::kFeatures>& grad,
                                      const TokenRows<Tile, Tile::kColumns>& x, int steps, int warp_feature,
                                      int warp_column) {
  const uint32_t base = ptx::shared_address(ptx::dynamic_shared());
  auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = base + step % Tile::kStages * Tile::kStageBytes;
      grad.load(stage, step);
      x.load(stage + Tile::kXAt, step);
    }
    ptx::cp_async_commit();
  };

#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this step's copies are everyone's; the stage that `load` fills was read to its end
    load(step + Tile::kStages - 1);
    multiply_step<Tile>(sums, base + step % Tile::kStages * Tile::kStageBytes, warp_feature, warp_column);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the pipeline's memory is free
}

template <class Tile>
SPARSEOPS_DEVICE void stage_sums(const Fragment<float> (&sums)[Tile::kRowTiles][Tile::kColumnTiles], float* tile,
                                 int warp_feature, int warp_column) {
  using Pair = Fragment<float, 2>;
  const int lane = threadIdx.x % 32;
  float* corner = tile + (warp_feature + lane / 4) * Tile::kPitch + warp_column + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
      const auto rows = reinterpret_cast<const Pair*>(sums[m][n].sum);  // g and g + 8
#pragma unroll
      for (int i = 0; i < 2; ++i) *reinterpret_cast<Pair*>(corner + (m * 16 + i * 8) * Tile::kPitch + n * 8) = rows[i];
    }
  }
}

// Chosen by comparison, not by indexing: everything stays in registers.
SPARSEOPS_DEVICE float column_of(const float4& group, int column) {
  return column == 0 ? group.x : column == 1 ? group.y : column == 2 ? group.z : group.w;
}

template <class element_t>
struct alignas(2 * sizeof(element_t)) KeptPair {
  element_t element[2];
};

// Stores what the pattern keeps of the tile, a group of four columns to a thread.
template <class Tile>
SPARSEOPS_DEVICE void store_kept(const CudaNM24GradValues& op, const float* tile, int feature0, int column0) {
  using Pair = KeptPair<typename Tile::element_t>;
  constexpr int kGroups = Tile::kColumns / 4;
  const int group = threadIdx.x % kGroups, column = column0 + group * 4;
  if (column >= op.cols) return;

  const int columns = static_cast<int>(op.in_features) - column;  // of the group and past it
  const int end = static_cast<int>(min(op.rows - feature0, int64_t(Tile::kFeatures)));
#pragma unroll 4
  for (int row = threadIdx.x / kGroups; row < end; row += Tile::kThreads / kGroups) {
    const int64_t at = ((feature0 + row) * op.cols + column) / 4;  // the group, counted through the weight
    const int nibble = op.meta[at / 2] >> (at % 2 * 4) & 0xF;
    const auto sums = *reinterpret_cast<const float4*>(tile + row * Tile::kPitch + group * 4);
    Pair kept;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int within = i == 0 ? nibble & 3 : nibble >> 2;
      const float sum = column_of(sums, within);
      kept.element[i] = within < columns ? sum : 0.f;
    }
    static_cast<Pair*>(op.grad_values)[at] = kept;
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) nm24_grad_values_kernel(CudaNM24GradValues op) {
  using element_t = typename Tile::element_t;
  const int feature0 = blockIdx.x * Tile::kFeatures, column0 = blockIdx.y * Tile::kColumns;
  const int warp = threadIdx.x / 32;
  const int warp_feature = warp % 2 * Tile::kWarpFeatures, warp_column = warp / 2 * Tile::kWarpColumns;
  const TokenRows<Tile, Tile::kFeatures> grad{static_cast<const element_t*>(op.grad), op.grad_stride, op.tokens,
                                              op.rows, feature0};
  const TokenRows<Tile, Tile::kColumns> x{static_cast<const element_t*>(op.x), op.x_stride, op.tokens, op.in_features,
                                          column0};

  Fragment<float> sums[Tile::kRowTiles][Tile::kColumnTiles] = {};
  const int steps = static_cast<int>((op.tokens + Tile::kDepth - 1) / Tile::kDepth);
  multiply_tokens<Tile>(sums, grad, x, steps, warp_feature, warp_column);

  const auto tile = reinterpret_cast<float*>(ptx::dynamic_shared());
  stage_sums<Tile>(sums, tile, warp_feature, warp_column);
  __syncthreads();
  store_kept<Tile>(op, tile, feature0, column0);
}

}  // namespace sparseops
