// The product of a tile of a 2:4 weight with a tile of activations: copies to shared memory several steps ahead, then
// ldmatrix and mma.sp. Where the activations come from is the loader's business (rows of a matrix, or the pixels under
// the taps of a convolution); all else is shared.
//
// The weight is the left operand, the only one that may be sparse, so a tile is [features, tokens], y transposed.
// One step is 64 columns of 16-bit elements, 128 of 8-bit ones: always 64 bytes of kept values and 128 bytes of
// activations a row, and two instructions deep. Metadata comes in slabs of 128 columns, with the first step of each.
//
// Bound (A100: 2048 multiply-adds and 128 bytes of shared memory a clock and SM). A step of the large tile takes 512
// clocks of mma.sp. It moves 25 KB into shared memory and, with eight warps of 64x32, 68 KB out of it: 744 clocks, so
// 0.69 of the peak at best. Four warps of 64x64 would read 50 KB (0.85), but their 128 sums, 24 operands and the
// addresses do not fit into 168 registers. The small tile, 128 clocks of mma.sp, moves 12.5 KB in and 25 KB out: 0.43.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tile_index.cuh"
#include "ops.h"

namespace sparseops {

template <class element_t_, int kFeatures_, int kTokens_, int kWarpFeatures_, int kWarpTokens_, int kStages_>
struct TileConfig {
  using element_t = element_t_;
  static constexpr bool kBytes = std::is_same_v<element_t, int8_t>;  // 8-bit elements
  using acc_t = std::conditional_t<kBytes, int32_t, float>;

  static constexpr int kFeatures = kFeatures_, kTokens = kTokens_, kStages = kStages_;
  static constexpr int kWarpFeatures = kWarpFeatures_, kWarpTokens = kWarpTokens_;
  static constexpr int kWarps = kFeatures / kWarpFeatures * (kTokens / kWarpTokens);
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRowTiles = kWarpFeatures / 16, kColumnTiles = kWarpTokens / 8;  // of a warp, in instructions
  static constexpr int kFragments = kRowTiles * kColumnTiles;

  static constexpr int kColumns = 128 / sizeof(element_t);  // of a step
  static constexpr int kChunk = 16 / sizeof(element_t);     // elements of the widest copy
  static constexpr int kSlabSteps = 128 / kColumns;

  static constexpr int kXAt = kFeatures * 64, kMetadataAt = kXAt + kTokens * 128;
  static constexpr int kStageBytes = kMetadataAt + kFeatures * 16;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = std::max(kPipelineBytes, kTileBytes<kFeatures, kTokens>);

  static_assert(kRowTiles % 2 == 0, "a word of metadata serves two 16-row tiles");
  static_assert(kFeatures * 4 % kThreads == 0 && kTokens * 8 % kThreads == 0, "every thread copies as much");
  static_assert(kThreads % 8 == 0, "a thread keeps its chunk from row to row");
  static_assert(kThreads >= kFeatures, "every slot of metadata has a thread to copy it");
  static_assert(kSlabSteps <= 2, "metadata comes in slabs of one or two steps");
  static_assert(kStages >= 2, "one stage is read while another is written");
};

template <class element_t>
using LargeTile = TileConfig<element_t, 128, 128, 64, 32, 3>;
template <class element_t>
using SmallTile = TileConfig<element_t, 64, 64, 32, 32, 4>;

// 16-byte chunks change places within 128 bytes, so that the same chunk of eight rows, which is what an ldmatrix reads,
// lies in eight different places.
SPARSEOPS_DEVICE uint32_t value_at(unsigned row, unsigned chunk) { return row * 64 + ((chunk ^ (row / 2 % 4)) * 16); }
SPARSEOPS_DEVICE uint32_t x_at(unsigned row, unsigned chunk) { return row * 128 + ((chunk ^ (row % 8)) * 16); }
// The same for the slots of metadata, of which a warp reads every eighth (the rows g, g + 8, g + 16, g + 24) at a time.
SPARSEOPS_DEVICE uint32_t slot_at(unsigned slot) { return (slot / 8 * 8 + (slot % 8 ^ slot / 8 % 4 * 2)) * 16; }

// The rows of the weight that a tile takes.
struct WeightRows {
  int row0, end_row;  // of values; those past the end count as zero
  int slot0;          // of the slabs
};

// Copies rows of a matrix to a stage, step after step: `kCopied` rows of `kChunks` chunks of 16 bytes. Only the thread's
// first row has a pointer, which moves with the steps; the others lie at equal distances from it.
template <class Tile, int kCopied, int kChunks>
struct RowCopier {
  using element_t = typename Tile::element_t;
  static constexpr int kRows = Tile::kThreads / kChunks;  // copied at a time
  const element_t *source, *matrix;
  int64_t stride;  // elements between rows
  int rows_left, columns_left;

  // From column `column` of `rows` rows of `columns` columns, beginning `offset` elements into `elements`.
  SPARSEOPS_DEVICE void start(const element_t* elements, int64_t offset, int64_t row_stride, int64_t rows, int columns,
                              int column) {
    const int row = threadIdx.x / kChunks, first = column + threadIdx.x % kChunks * Tile::kChunk;
    matrix = elements;
    source = elements + offset + row * row_stride + first;
    stride = row_stride;
    rows_left = static_cast<int>(min(rows, int64_t(kCopied))) - row;
    columns_left = columns - first;
  }

  // `to` is where the thread's first row goes.
  SPARSEOPS_DEVICE void load(uint32_t to) {
#pragma unroll
    for (int i = 0; i < kCopied / kRows; ++i) {
      const bool inside = i * kRows < rows_left && columns_left > 0;
      ptx::cp_async<16>(to + i * kRows * kChunks * 16, inside ? source + i * kRows * stride : matrix, inside ? 16 : 0);
    }
    source += kChunks * Tile::kChunk;
    columns_left -= kChunks * Tile::kChunk;
  }
};

// Copies the weight's part of the steps.
template <class Tile>
struct WeightLoader {
  RowCopier<Tile, Tile::kFeatures, 4> values;
  const unsigned char* slab;  // the thread's slot
  int64_t slab_bytes;

  SPARSEOPS_DEVICE void start(const CudaWeight& weight, const WeightRows& rows, int first_step) {
    const int kept = static_cast<int>(weight.cols / 2);
    values.start(static_cast<const typename Tile::element_t*>(weight.values), int64_t(rows.row0) * kept, kept,
                 rows.end_row - rows.row0, kept, first_step * (Tile::kColumns / 2));
    slab_bytes = weight.slab_rows * 16;
    // Zeros would be no metadata, so rows past the end take the last slot's.
    const int64_t slot = min(int64_t(rows.slot0) + threadIdx.x, weight.slab_rows - 1);
    slab = static_cast<const unsigned char*>(weight.slabs) + first_step / Tile::kSlabSteps * slab_bytes + slot * 16;
  }

  SPARSEOPS_DEVICE void load(uint32_t stage, bool first_of_slab) {
    values.load(stage + value_at(threadIdx.x / 4, threadIdx.x % 4));
    if (!first_of_slab) return;
    if (threadIdx.x < Tile::kFeatures) ptx::cp_async<16>(stage + Tile::kMetadataAt + slot_at(threadIdx.x), slab, 16);
    slab += slab_bytes;
  }
};

// The metadata of the row tiles of a warp: read once for a slab, used up step by step. Of 16-bit elements a lane holds
// the four words of one slot for each pair of tiles: lanes 0 and 1 of every four those of the first tile, lanes 2 and 3
// those of the second, which the instruction's selector tells apart. Of 8-bit elements all four lanes serve one tile,
// lanes 0 and 1 with the first 32 columns of each instruction, lanes 2 and 3 with the last.
template <class Tile>
struct Metadata {
  static constexpr int kPairs = Tile::kRowTiles / 2;
  static constexpr int kSlots = Tile::kBytes ? 2 * kPairs : kPairs, kWords = Tile::kBytes ? 2 : 4;
  uint32_t words[kSlots][kWords];

  SPARSEOPS_DEVICE void read(const unsigned char* metadata, int warp_feature) {
    const unsigned lane = threadIdx.x % 32, in_tile = lane % 2 * 8 + lane / 4;
    const bool upper = lane % 4 >= 2;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int first = Tile::kBytes ? warp_feature + i / 2 * 32 : warp_feature + i * 32;
      const unsigned slot = in_tile + (Tile::kBytes ? i % 2 * 16u : upper * 16u);
      const uint4 words4 = *reinterpret_cast<const uint4*>(metadata + first * 16 + slot_at(slot));
      if constexpr (Tile::kBytes) {
        words[i][0] = upper ? words4.y : words4.x;
        words[i][1] = upper ? words4.w : words4.z;
      } else {
        words[i][0] = words4.x;
        words[i][1] = words4.y;
        words[i][2] = words4.z;
        words[i][3] = words4.w;
      }
    }
  }

  // On to the slab's next step, if it has one.
  SPARSEOPS_DEVICE void advance() {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
#pragma unroll
      for (int word = 2; word < kWords; ++word) words[i][word - 2] = words[i][word];
    }
  }

  // For row tile `tile` and the step's first or second instruction.
  SPARSEOPS_DEVICE uint32_t word(int tile, int half) const { return words[Tile::kBytes ? tile : tile / 2][half]; }
};

template <class Tile, int kSelector>
SPARSEOPS_DEVICE void multiply(typename Tile::acc_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                               uint32_t metadata) {
  if constexpr (Tile::kBytes) {
    ptx::mma_sp_m16n8k64(sums, a, b, metadata);
  } else {
    ptx::mma_sp_m16n8k32<typename Tile::element_t, kSelector>(sums, a, b, metadata);
  }
}

// Adds the product of a stage to a warp's sums.
template <class Tile>
SPARSEOPS_DEVICE void multiply_step(Fragment<typename Tile::acc_t> (&sums)[Tile::kFragments], uint32_t stage,
                                    const Metadata<Tile>& metadata, int warp_feature, int warp_token) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t a_at = (stage + warp_feature * 64 + value_at(lane % 16, lane / 16)) ^ (half * 32);
    const uint32_t b_at = (stage + Tile::kXAt + warp_token * 128 + x_at(lane % 8, lane / 8)) ^ (half * 64);
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) ptx::ldmatrix_x4(a[m], a_at + m * 16 * 64);
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, b_at + n * 8 * 128);
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; m += 2) {
        auto& first = sums[m * Tile::kColumnTiles + n].sum;
        auto& second = sums[(m + 1) * Tile::kColumnTiles + n].sum;
        multiply<Tile, 0>(first, a[m], b, metadata.word(m, half));
        multiply<Tile, 1>(second, a[m + 1], b, metadata.word(m + 1, half));
      }
    }
  }
}

// The sums of a warp over `steps` steps, the first of which begins a slab. `w.load` and `x.load` copy one step's
// operands after another's; x goes to kTokens rows of 128 bytes, x_at.
template <class Tile, class Loader>
SPARSEOPS_DEVICE void multiply_tile(Fragment<typename Tile::acc_t> (&sums)[Tile::kFragments], WeightLoader<Tile>& w,
                                    Loader& x, int steps, int warp_feature, int warp_token) {
  unsigned char* const shared = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(shared);
  auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = base + step % Tile::kStages * Tile::kStageBytes;
      w.load(stage, step % Tile::kSlabSteps == 0);
      x.load(stage + Tile::kXAt);
    }
    ptx::cp_async_commit();
  };

#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  Metadata<Tile> metadata;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this step's copies are everyone's; the stage that `load` fills was read to its end
    load(step + Tile::kStages - 1);
    const uint32_t stage = step % Tile::kStages * Tile::kStageBytes;
    if (step % Tile::kSlabSteps == 0) metadata.read(shared + stage + Tile::kMetadataAt, warp_feature);
    multiply_step<Tile>(sums, base + stage, metadata, warp_feature, warp_token);
    metadata.advance();
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the pipeline's memory is free
}

// One output tile, or one block's share of it: the product, then the other splits' sums, then y.
template <class Tile, class Loader>
SPARSEOPS_DEVICE void compute_tile(const CudaWeight& weight, const WeightRows& rows, Loader& x,
                                   const CudaEpilogue& epilogue, const TileOfY& at, const CudaPlan& plan, int tile) {
  using acc_t = typename Tile::acc_t;
  const int warp = threadIdx.x / 32;
  const int warp_feature = warp % (Tile::kFeatures / Tile::kWarpFeatures) * Tile::kWarpFeatures;
  const int warp_token = warp / (Tile::kFeatures / Tile::kWarpFeatures) * Tile::kWarpTokens;

  // Splits are whole slabs, so that each begins with its metadata.
  const int steps = static_cast<int>((weight.cols + Tile::kColumns - 1) / Tile::kColumns);
  const int slabs = (steps + Tile::kSlabSteps - 1) / Tile::kSlabSteps;
  const int split = blockIdx.z, split_slabs = (slabs + plan.splits - 1) / plan.splits;
  const int first_step = split * split_slabs * Tile::kSlabSteps;

  WeightLoader<Tile> w;
  w.start(weight, rows, first_step);
  x.start(first_step);
  Fragment<acc_t> sums[Tile::kFragments] = {};
  multiply_tile<Tile>(sums, w, x, min(steps - first_step, split_slabs * Tile::kSlabSteps), warp_feature, warp_token);
  if (plan.splits > 1 && !reduce_splits(sums, plan, tile, split)) return;

  auto staged = reinterpret_cast<acc_t*>(ptx::dynamic_shared());
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n)
      stage_fragment<Tile::kFeatures>(sums[m * Tile::kColumnTiles + n], staged, warp_feature + m * 16,
                                      warp_token + n * 8);
  __syncthreads();
  store_tile<Tile::kFeatures, Tile::kTokens, Tile::kThreads>(epilogue, at, staged);
}

}  // namespace sparseops
