// y[t, m] = act(sum_k x[t, k] * w[m, k] * x_scale[t] * w_scale[m] + bias[m] + residual[t, m]), w 2:4, for any number of
// tokens t; up to 16 of them are better served by nm24_few_tokens.cuh.
//
//   x [tokens, in_features], w [rows, cols] as values and slabs, y [tokens, rows]; f16, bf16, i8
//
// One block of threads computes one output tile (mainloop.cuh), or with splits its share of the columns.
//
// Operations: tokens * rows * cols multiply-adds, of which half are done. Bytes, for 16-bit elements and tiles that do
// not overlap in the cache: rows * cols * 1.125 for each column of tiles, tokens * cols * 2 for each row of them.
// State: it has not yet run on a GPU; tests/emulation runs it on the CPU.
#pragma once
#include "cuda/mainloop.cuh"

namespace sparseops {

// The rows of x that a tile takes.
template <class Tile>
struct RowLoader {
  const CudaNM24Linear& op;
  int64_t token0;
  RowCopier<Tile, Tile::kTokens, 8> rows;

  SPARSEOPS_DEVICE void start(int first_step) {
    rows.start(static_cast<const typename Tile::element_t*>(op.x), token0 * op.x_stride, op.x_stride,
               op.tokens - token0, static_cast<int>(op.in_features), first_step * Tile::kColumns);
  }

  SPARSEOPS_DEVICE void load(uint32_t to) { rows.load(to + x_at(threadIdx.x / 8, threadIdx.x % 8)); }
};

// Bounded as if by 512 threads, to 128 registers: two blocks of the large tile, four of the small one fit an SM.
template <class Tile>
__global__ void __launch_bounds__(512) nm24_linear_kernel(CudaNM24Linear op, CudaPlan plan) {
  const int feature_tiles = static_cast<int>((op.weight.rows + Tile::kFeatures - 1) / Tile::kFeatures);
  const int token_tiles = static_cast<int>((op.tokens + Tile::kTokens - 1) / Tile::kTokens);
  const TileIndex index(blockIdx.x, feature_tiles, token_tiles);
  const int feature0 = index.feature * Tile::kFeatures, rows = static_cast<int>(op.weight.rows);
  const int64_t token0 = int64_t(index.token) * Tile::kTokens;

  RowLoader<Tile> x{op, token0, {}};
  compute_tile<Tile>(op.weight, {feature0, rows, feature0}, x, op.epilogue,
                     {op.y, op.weight.rows, token0, op.tokens, feature0, rows}, plan, blockIdx.x);
}

}  // namespace sparseops
