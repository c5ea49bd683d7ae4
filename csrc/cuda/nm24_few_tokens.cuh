// y[t, m] = act(sum_k x[t, k] * w[m, k] + bias[m] + residual[t, m]), w 2:4, for so few tokens t that reading the weight
// is all the work.
//
//   x [tokens, in_features], w [rows, cols] as values and slabs, y [tokens, rows]; f16, bf16
//
// A block computes 32 features of 8 or 16 tokens. The slabs of 128 columns are dealt out to its warps, with splits to
// several blocks first; each warp works on its own, from global memory to sums, until all of them are added up.
//
// A slab of a block is 4608 bytes of weight, read once, past L1, into registers, and 256 bytes of x a token from the
// caches; 8 tokens take 8 mma.sp, 16 tokens 16. Bound: memory. An A100 needs 450 clocks an SM to read the 4608 bytes,
// its tensor cores 16 or 32 to multiply them. Each warp has one slab on its way while it multiplies another: 36 KB a
// block, of which about 12 would hide the latency of an H100's memory (15 bytes a clock and SM, 800 clocks).
// State: it has not yet run on a GPU; tests/emulation runs it on the CPU.
//
// Order of columns. A lane's share of an instruction is the kept values of two groups of four columns in each of two
// rows; that would be loads of 4 bytes. So groups change places within a slab, in values, metadata and x alike:
//
//   group 4i + s of a slab is group i of step s        i = 0..7, s = 0..3
//
// A 16-byte chunk of values, four groups, then is one group of all four steps, and a lane needs whole chunks.
#pragma once
#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"
#include "ops.h"

namespace sparseops {

template <class element_t_, int kTokens_>
struct NM24FewTokens {
  using element_t = element_t_;
  static constexpr int kFeatures = 32, kTokens = kTokens_, kTokenTiles = kTokens / 8;
  static constexpr int kWarps = 8, kThreads = kWarps * 32;
  static constexpr int kXBytes = kTokens * 256;   // of a slab
  static constexpr int kWarpBytes = 2 * kXBytes;  // one slab is read while the next arrives
  static constexpr int kSharedBytes = kWarps * kWarpBytes;
  static constexpr int kSums = kFeatures * kTokens / kThreads;  // of a thread, once those of the warps are added up

  static_assert(sizeof(element_t) == 2, "mma.sp m16n8k32");
  static_assert(kTokens % 8 == 0, "tokens come in columns of an instruction");
  static_assert(kSums * kThreads == kFeatures * kTokens && kFeatures % kSums == 0);
  static_assert(kTileBytes<kFeatures, kTokens> <= kWarpBytes, "a warp's sums lie where its x was");
};

// A lane's share of a slab of 32 rows, lane = 4g + t: chunks t and t + 4 of the rows g, g + 8, g + 16 and g + 24, and
// one slot of metadata.
struct WeightSlab {
  uint4 chunks[4][2];
  uint4 slot;
};

SPARSEOPS_DEVICE uint32_t word_of(const uint4& v, int i) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  return words[i];
}

// The chunk of 16 kept 16-bit values that begins at column c begins at byte c of its row.
SPARSEOPS_DEVICE WeightSlab load_weight_slab(const CudaWeight& weight, int feature0, int slab) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int column = slab * 128 + t * 16;
  auto source = static_cast<const unsigned char*>(weight.values) + (feature0 + g) * weight.cols + column;
  WeightSlab loaded;
#pragma unroll
  for (int i = 0; i < 4; ++i, source += 8 * weight.cols) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool inside = feature0 + g + 8 * i < weight.rows && column + 64 * j < weight.cols;
      loaded.chunks[i][j] = inside ? ptx::load_streaming(source + 64 * j) : uint4{0, 0, 0, 0};
    }
  }
  // Metadata is there for all rows of a 16-row tile; zeros would be none, so rows past its end take the last slot's.
  const int64_t slot = min(int64_t(feature0 + 16 * (t / 2) + 8 * (t % 2) + g), weight.slab_rows - 1);
  const auto slabs = static_cast<const unsigned char*>(weight.slabs);
  loaded.slot = ptx::load_streaming(slabs + (slab * weight.slab_rows + slot) * 16);
  return loaded;
}

// The metadata of the four steps, in the order of columns given above. Lanes 4g and 4g + 1 hold it for the first 16-row
// tile, each for four of a step's groups: those of columns 0-63 of the slab the first, those of columns 64-127 the
// second; lanes 4g + 2 and 4g + 3 for the second tile. A slot has the words of every other 16 columns, so each of two
// such lanes needs half the other's.
SPARSEOPS_DEVICE void metadata_of_steps(uint32_t (&steps)[4], const uint4& slot) {
  const bool second = threadIdx.x % 2;
  uint32_t words[4];  // 16 columns each, ascending; row g in the low half, row g + 8 in the high half
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = word_of(slot, i), high = word_of(slot, 2 + i);
    const uint32_t own = second ? high : low, other = __shfl_xor_sync(0xffffffffu, second ? low : high, 1);
    words[2 * i] = second ? other : own;
    words[2 * i + 1] = second ? own : other;
  }
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    steps[step] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) steps[step] |= (words[i] >> (4 * step) & 0x000F000F) << (4 * i);
  }
}

// Where groups 2i and 2i + 1 of a step lie in the x of a slab, whose rows are tokens of 256 bytes. Chunks change places
// so that neither eight tokens' same chunks, which ldmatrix reads, share banks, nor 16 neighbouring groups of a token,
// which a half-warp writes.
SPARSEOPS_DEVICE uint32_t x_chunk_at(int token, int step, int i) {
  return token * 256 + ((step * 4 + i) ^ (token % 8) ^ (step / 2 * 2)) * 16;
}

// Starts to copy the x of a slab for a warp, a group of four columns to a lane; what is not of x becomes zero.
template <class Tile>
SPARSEOPS_DEVICE void copy_x(const CudaNM24Linear& op, int64_t token0, int slab, uint32_t to) {
  using element_t = typename Tile::element_t;
  const int group = threadIdx.x % 32, step = group % 4, i = group / 4, column = slab * 128 + group * 4;
  const int tokens = column < op.in_features ? static_cast<int>(min(op.tokens - token0, int64_t(Tile::kTokens))) : 0;
  const auto x = static_cast<const element_t*>(op.x);
  // One address leads to the next: 16 of them, ready in registers, would be too many.
  const element_t* source = x + token0 * op.x_stride + column;
#pragma unroll
  for (int token = 0; token < Tile::kTokens; ++token, source += op.x_stride) {
    const bool inside = token < tokens;
    ptx::cp_async<8>(to + x_chunk_at(token, step, i / 2) + i % 2 * 8, inside ? source : x, inside ? 8 : 0);
  }
  ptx::cp_async_commit();
}

template <class Tile>
SPARSEOPS_DEVICE void multiply_slab(Fragment<float> (&sums)[2][Tile::kTokenTiles], const WeightSlab& weight,
                                    uint32_t x) {
  using element_t = typename Tile::element_t;
  const int lane = threadIdx.x % 32;
  uint32_t metadata[4];
  metadata_of_steps(metadata, weight.slot);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = word_of(weight.chunks[2 * m + i % 2][i / 2], step);
#pragma unroll
    for (int n = 0; n < Tile::kTokenTiles; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, x + x_chunk_at(n * 8 + lane % 8, step, lane / 8));
      ptx::mma_sp_m16n8k32<element_t, 0>(sums[0][n].sum, a[0], b, metadata[step]);
      ptx::mma_sp_m16n8k32<element_t, 1>(sums[1][n].sum, a[1], b, metadata[step]);
    }
  }
}

// A warp's sums over every kWarps-th slab from `slab` to before `end`. Weight and x of the next slab are on their way
// while one is multiplied.
template <class Tile>
SPARSEOPS_DEVICE void multiply_slabs(Fragment<float> (&sums)[2][Tile::kTokenTiles], const CudaNM24Linear& op,
                                     int feature0, int64_t token0, int slab, int end, uint32_t shared) {
  if (slab >= end) return;
  WeightSlab next = load_weight_slab(op.weight, feature0, slab);
  copy_x<Tile>(op, token0, slab, shared);
  for (uint32_t present = 0; slab < end; slab += Tile::kWarps, present ^= Tile::kXBytes) {
    const WeightSlab weight = next;
    const bool more = slab + Tile::kWarps < end;
    if (more) next = load_weight_slab(op.weight, feature0, slab + Tile::kWarps);
    ptx::cp_async_wait<0>();
    __syncwarp();  // the x of this slab is every lane's, and that of the last one was read to its end
    if (more) copy_x<Tile>(op, token0, slab + Tile::kWarps, shared + (present ^ Tile::kXBytes));
    multiply_slab<Tile>(sums, weight, shared + present);
  }
  __syncwarp();  // the warp's memory is free
}

// Adds up the warps' sums, in the order of the warps. A thread gets those of neighbouring features.
template <class Tile>
SPARSEOPS_DEVICE void add_warps(Fragment<float, Tile::kSums>& sum, const Fragment<float> (&sums)[2][Tile::kTokenTiles],
                                unsigned char* shared, int offset) {
  auto own = reinterpret_cast<float*>(shared + threadIdx.x / 32 * Tile::kWarpBytes);
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kTokenTiles; ++n) stage_fragment<Tile::kFeatures>(sums[m][n], own, m * 16, n * 8);
  __syncthreads();
  sum = {};
#pragma unroll
  for (int warp = 0; warp < Tile::kWarps; ++warp) {
    const auto tile = reinterpret_cast<const float*>(shared + warp * Tile::kWarpBytes);
    const auto part = *reinterpret_cast<const Fragment<float, Tile::kSums>*>(tile + offset);
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) sum.sum[i] += part.sum[i];
  }
}

template <class element_t, int kTokens>
__global__ void __launch_bounds__(NM24FewTokens<element_t, kTokens>::kThreads, 2)
    nm24_few_tokens_kernel(CudaNM24Linear op, CudaPlan plan) {
  using Tile = NM24FewTokens<element_t, kTokens>;
  unsigned char* const shared = ptx::dynamic_shared();
  const int rows = static_cast<int>(op.weight.rows), feature_tiles = (rows + Tile::kFeatures - 1) / Tile::kFeatures;
  const int feature0 = blockIdx.x % feature_tiles * Tile::kFeatures;
  const int64_t token0 = int64_t(blockIdx.x / feature_tiles) * kTokens;

  const int slabs = static_cast<int>((op.weight.cols + 127) / 128);
  const int split_slabs = (slabs + plan.splits - 1) / plan.splits, slab0 = blockIdx.z * split_slabs;
  const int warp = threadIdx.x / 32;
  Fragment<float> sums[2][Tile::kTokenTiles] = {};
  multiply_slabs<Tile>(sums, op, feature0, token0, slab0 + warp, min(slabs, slab0 + split_slabs),
                       ptx::shared_address(shared + warp * Tile::kWarpBytes));

  constexpr int kLanes = Tile::kFeatures / Tile::kSums;
  const int offset = threadIdx.x / kLanes * kTilePitch<Tile::kFeatures> + threadIdx.x % kLanes * Tile::kSums;
  Fragment<float, Tile::kSums> sum[1];
  add_warps<Tile>(sum[0], sums, shared, offset);
  if (plan.splits > 1 && !reduce_splits(sum, plan, blockIdx.x, blockIdx.z)) return;

  const auto tile = reinterpret_cast<float*>(shared);
  *reinterpret_cast<Fragment<float, Tile::kSums>*>(tile + offset) = sum[0];  // which no other thread has read
  __syncthreads();
  store_tile<Tile::kFeatures, kTokens, Tile::kThreads>(op.epilogue,
                                                       {op.y, op.weight.rows, token0, op.tokens, feature0, rows}, tile);
}

}  // namespace sparseops
