// The product of a tile of a 2:4 weight with a tile of activations on sm_90a: one warp copies, two or three warpgroups
// multiply by wgmma.sp, and blocks stay for as many tiles as there are (epilogue_sm90.cuh has the way out of a tile).
//
// The weight is the left operand, the only one that may be sparse, so a tile is [features, tokens], y transposed. One
// stage is 128 bytes of kept values a row (128 columns of 16-bit elements, 256 of 8-bit ones) and its metadata; two
// atoms of activations, each 128 bytes a row, go with it. All lie in shared memory as the copy engine swizzles them and
// descriptor_128b says. Atoms are handed back one by one: with 256 tokens an atom is 32 KB, and whole stages of two would
// leave room for no more than two of them.
//
// Two blocks may form a cluster: they take neighbouring features and the same tokens, and each copies half of the
// activations to both. So an atom is free when the consumers of both have let go of it.
//
// Bound (H100: 4096 multiply-adds of the whole weight, 128 bytes of shared memory a clock and SM), one stage of the
// tile of 128 x 256: 1024 clocks of wgmma.sp; 82 KB into shared memory and 18 + 128 KB out of it, 1824 clocks if fills
// count like reads, so 0.56 of the peak, else 1168. From registers (kFromRegisters) 64 + 128 KB, 1536 clocks: 0.67. For
// 192 x 192: 75 KB in and 171 out for 1152 clocks of wgmma.sp: 0.59. From L2 the first reads 82 KB, a cluster 50 KB a
// block. Nothing of this has been measured.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/tile_index.cuh"
#include "cuda/wgmma_sp.cuh"
#include "ops.h"

namespace sparseops {

inline constexpr int kSm90SharedBytes = 227 * 1024;  // of a block, at most

template <class element_t_, int kFeatures_, int kTokens_, int kConsumers_, int kStages_, bool kFromRegisters_ = false>
struct Sm90Tile {
  using element_t = element_t_;
  using acc_t = ptx::sum_t<element_t>;
  static constexpr int kFeatures = kFeatures_, kTokens = kTokens_, kConsumers = kConsumers_;
  static constexpr int kStages = kStages_;                 // of the weight
  static constexpr bool kFromRegisters = kFromRegisters_;  // values and metadata never enter shared memory
  static constexpr bool k8Bit = ptx::kIs8Bit<element_t>;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRows = kFeatures / kConsumers;
  static constexpr int kRowTiles = kConsumerRows / 64;  // of a consumer, in instructions
  static constexpr int kSums = kTokens / 2;             // of a thread, in a row tile
  using Sums = acc_t[kRowTiles][kSums];

  static constexpr int kAtomColumns = 128 / sizeof(element_t), kStageColumns = 2 * kAtomColumns;
  static constexpr int kSlabs = kStageColumns / 128;  // of metadata, in a stage

  static constexpr int kValueBytes = kFeatures * 128, kAtomBytes = kTokens * 128;
  static constexpr int kMetadataBytes = kFeatures * 16 * kSlabs;

  // A consumer's memory for parts of y on their way out: kBuffers of 64 features by a few tokens.
  static constexpr int kBuffers = kConsumers == 3 ? 1 : 2, kBufferBytes = 4096;

  // Atoms take what shared memory the rest leaves, up to those of all stages.
  static constexpr int kWeightBytes = kFromRegisters ? 0 : kStages * (kValueBytes + kMetadataBytes);
  static constexpr int kBuffersBytes = kConsumers * kBuffers * kBufferBytes;
  static constexpr int kRoom = (kSm90SharedBytes - kWeightBytes - kBuffersBytes - 1024) / kAtomBytes;
  static constexpr int kAtoms = kFromRegisters || kRoom < 2 * kStages ? kRoom : 2 * kStages;

  static constexpr int kAtomsAt = kFromRegisters ? 0 : kStages * kValueBytes;
  static constexpr int kBuffersAt = kAtomsAt + kAtoms * kAtomBytes;
  static constexpr int kMetadataAt = kBuffersAt + kBuffersBytes;
  static constexpr int kBarriersAt = kMetadataAt + (kFromRegisters ? 0 : kStages * kMetadataBytes);
  static constexpr int kBarriers = 3 * kStages + 2 * kAtoms + kConsumers * kBuffers;
  static constexpr int kArrivedAt = kBarriersAt + kBarriers * 8;  // a word for each consumer
  static constexpr int kSharedBytes = kArrivedAt + kConsumers * 4;

  // Registers of a thread: what the warpgroup that copies keeps, and what consumers take.
  static constexpr int kCopierRegisters = kFromRegisters ? 40 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 152 : kFromRegisters ? 232 : 224;

  static_assert(128 * (kCopierRegisters + kConsumers * kConsumerRegisters) <= 65536);
  static_assert(kConsumers == 2 || kConsumers == 3);
  static_assert(kConsumerRows % 64 == 0 && kFeatures <= 256 && kTokens <= 256, "a copy's box is at most 256 rows");
  static_assert(kRowTiles * kSums <= (kConsumers == 3 ? 96 : 128), "sums stay in registers");
  static_assert(kValueBytes % 1024 == 0 && kAtomBytes % 1024 == 0, "swizzled rows begin at multiples of 1024 bytes");
  static_assert(kStages >= 2 && kAtoms >= 3, "one is read while another is written");
  static_assert(kSharedBytes <= kSm90SharedBytes);
  static_assert(!kFromRegisters || !k8Bit, "fragments are made of 16-bit values alone");
};

// A place in a ring of slots, and how often it came round: the parity that its mbarriers are waited for by.
template <int kSlots>
struct Ring {
  uint32_t slot = 0, parity = 0;

  SPARSEOPS_DEVICE void advance() {
    if (++slot < kSlots) return;
    slot = 0;
    parity ^= 1;
  }
};

// The block's mbarriers.
template <class Tile>
struct Barriers {
  uint32_t first;

  SPARSEOPS_DEVICE uint32_t full_values(uint32_t stage) const { return first + stage * 8; }
  SPARSEOPS_DEVICE uint32_t full_metadata(uint32_t stage) const { return first + (Tile::kStages + stage) * 8; }
  SPARSEOPS_DEVICE uint32_t empty_stage(uint32_t stage) const { return first + (2 * Tile::kStages + stage) * 8; }
  SPARSEOPS_DEVICE uint32_t full_atom(uint32_t atom) const { return first + (3 * Tile::kStages + atom) * 8; }
  SPARSEOPS_DEVICE uint32_t empty_atom(uint32_t atom) const {
    return first + (3 * Tile::kStages + Tile::kAtoms + atom) * 8;
  }
  SPARSEOPS_DEVICE uint32_t residual(uint32_t buffer) const {
    return first + (3 * Tile::kStages + 2 * Tile::kAtoms + buffer) * 8;
  }

  SPARSEOPS_DEVICE void init(int cluster) const {
    for (uint32_t i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(full_values(i), 1);
      ptx::mbarrier_init(full_metadata(i), 1);
      ptx::mbarrier_init(empty_stage(i), Tile::kConsumers);
    }
    for (uint32_t i = 0; i < Tile::kAtoms; ++i) {
      ptx::mbarrier_init(full_atom(i), 1);
      ptx::mbarrier_init(empty_atom(i), Tile::kConsumers * cluster);
    }
    for (uint32_t i = 0; i < Tile::kConsumers * Tile::kBuffers; ++i) ptx::mbarrier_init(residual(i), 1);
    ptx::fence_mbarrier_init();
  }
};

// All that a kernel needs to know of a product, whatever its activations are.
struct Sm90Product {
  CudaWeight weight;
  CudaEpilogue epilogue;
  CudaPlan plan;
  int64_t tokens;
  int stages;  // of all columns together
  CUtensorMap values, y, residual;
};

// What a block does between two moments at which it looks for more: one output tile, or a split of it.
struct Work {
  int feature0, token0;
  int tile, split;
  int first_stage, stages;
  bool exists;  // the second block of a cluster may have no features left
};

// The share of this block: every cluster takes its number, then the number of clusters further, and so on.
template <class Tile>
struct Schedule {
  const Sm90Product& product;
  int rank, feature_tiles, token_tiles, feature_groups, next, step;

  SPARSEOPS_DEVICE Schedule(const Sm90Product& p, int rank)
      : product(p),
        rank(rank),
        feature_tiles((static_cast<int>(p.weight.rows) + Tile::kFeatures - 1) / Tile::kFeatures),
        token_tiles(static_cast<int>((p.tokens + Tile::kTokens - 1) / Tile::kTokens)),
        feature_groups((feature_tiles + p.plan.cluster - 1) / p.plan.cluster),
        next(static_cast<int>(blockIdx.x) / p.plan.cluster),
        step(static_cast<int>(gridDim.x) / p.plan.cluster) {}

  SPARSEOPS_DEVICE bool take(Work& work) {
    const int tiles = feature_groups * token_tiles;
    if (next >= tiles * product.plan.splits) return false;
    const TileIndex index(next % tiles, feature_groups, token_tiles);
    const int feature_tile = index.feature * product.plan.cluster + rank;
    const int split_stages = (product.stages + product.plan.splits - 1) / product.plan.splits;
    work.feature0 = feature_tile * Tile::kFeatures;
    work.token0 = index.token * Tile::kTokens;
    work.tile = feature_tile * token_tiles + index.token;
    work.split = next / tiles;
    work.first_stage = work.split * split_stages;
    work.stages = min(split_stages, product.stages - work.first_stage);
    work.exists = feature_tile < feature_tiles;
    next += step;
    return true;
  }
};

// The rows whose metadata a tile takes. Those past the end, and all of a tile that does not exist, take that of others:
// their sums go nowhere, but metadata must be legal.
template <class Tile>
struct MetadataRows {
  int first, count;

  SPARSEOPS_DEVICE MetadataRows(const CudaWeight& weight, const Work& work)
      : first(work.exists ? work.feature0 : 0),
        count(static_cast<int>(min(int64_t{Tile::kFeatures}, weight.slab_rows - first))) {}
};

// ---- the warp that copies; one thread of it

template <class Tile, class Activations>
SPARSEOPS_DEVICE void copy_tiles(const Sm90Product& product, const Activations& activations, uint32_t base,
                                 const Barriers<Tile>& barriers, int rank) {
  const int cluster = product.plan.cluster, share = Tile::kTokens / cluster;
  const auto slabs = static_cast<const unsigned char*>(product.weight.slabs);
  const int last_slab = static_cast<int>((product.weight.cols - 1) / 128);
  Schedule<Tile> schedule(product, rank);
  // A weight that no second tile of tokens reads need not stay in the cache.
  const ptx::L2Policy policy = schedule.token_tiles == 1 ? ptx::L2Policy::evict_first : ptx::L2Policy::normal;
  Ring<Tile::kStages> at;
  Ring<Tile::kAtoms> atom;

  Work work;
  while (schedule.take(work)) {
    const MetadataRows<Tile> rows(product.weight, work);
    auto cursor = activations.start(2 * work.first_stage, work.token0 + rank * share);
    for (int stage = work.first_stage; stage < work.first_stage + work.stages; ++stage) {
      if constexpr (!Tile::kFromRegisters) {
        ptx::mbarrier_wait(barriers.empty_stage(at.slot), at.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(barriers.full_metadata(at.slot), Tile::kSlabs * rows.count * 16);
#pragma unroll
        for (int i = 0; i < Tile::kSlabs; ++i) {
          // past the end, where the last stage of 8-bit elements may be, any slab will do
          const int64_t slab = Tile::kSlabs == 1 ? stage : min(stage * Tile::kSlabs + i, last_slab);
          ptx::bulk_load(base + Tile::kMetadataAt + at.slot * Tile::kMetadataBytes + i * Tile::kFeatures * 16,
                         slabs + (slab * product.weight.slab_rows + rows.first) * 16, rows.count * 16,
                         barriers.full_metadata(at.slot));
        }
        ptx::mbarrier_arrive_expect_tx(barriers.full_values(at.slot), Tile::kValueBytes);
        ptx::tma_load<2>(base + at.slot * Tile::kValueBytes, &product.values, barriers.full_values(at.slot),
                         {stage * Tile::kAtomColumns, work.feature0}, policy);
        at.advance();
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t to = base + Tile::kAtomsAt + atom.slot * Tile::kAtomBytes, bar = barriers.full_atom(atom.slot);
        ptx::mbarrier_wait(barriers.empty_atom(atom.slot), atom.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(bar, Tile::kAtomBytes);
        activations.load(cursor, to + rank * share * 128, bar, cluster);
        atom.advance();
      }
    }
  }
}

// ---- the warpgroups that multiply

// A thread's row of slots or fragments among those of 16 rows, from the consumer's first row on.
SPARSEOPS_DEVICE int slot_of_thread(int row) {  // as mma.sp's fragments have it (formats/nm24_slabs.py)
  return row + static_cast<int>(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 2 * 8 + threadIdx.x % 32 / 4);
}

// The metadata of one stage: a word for each instruction.
template <class Tile>
struct StageMetadata {
  uint32_t word[Tile::kRowTiles][4];

  // From `stage` in shared memory, which holds `count` rows of the tile. `row` is the consumer's first.
  SPARSEOPS_DEVICE void read_shared(const unsigned char* stage, int row, int count) {
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
      const auto slots = reinterpret_cast<const uint4*>(stage) + min(slot_of_thread(row + tile * 64), count - 1);
#pragma unroll
      for (int slab = 0; slab < Tile::kSlabs; ++slab) set(tile, slab, slots[slab * Tile::kFeatures]);
    }
  }

  // `row` is the consumer's first row in the weight.
  SPARSEOPS_DEVICE void read_global(const CudaWeight& weight, int stage, int row) {
    const auto slots = static_cast<const uint4*>(weight.slabs) + stage * weight.slab_rows;
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
      const int slot = min(slot_of_thread(row + tile * 64), static_cast<int>(weight.slab_rows) - 1);
      set(tile, 0, ptx::load_streaming(slots + slot));
    }
  }

 private:
  SPARSEOPS_DEVICE void set(int tile, int slab, const uint4& slot) {
    if constexpr (Tile::k8Bit) {
      const bool upper = threadIdx.x % 4 >= 2;
      word[tile][2 * slab] = upper ? slot.y : slot.x;
      word[tile][2 * slab + 1] = upper ? slot.w : slot.z;
    } else {
      word[tile][0] = slot.x;
      word[tile][1] = slot.y;
      word[tile][2] = slot.z;
      word[tile][3] = slot.w;
    }
  }
};

// With kFromRegisters, the kept values of one stage.
template <class Tile>
struct StageFragments {
  uint32_t of_step[Tile::kFromRegisters ? Tile::kRowTiles : 1][4][4];

  // Half a stage, two steps: the other half may still be in use. `row` is the consumer's first row in the weight.
  SPARSEOPS_DEVICE void read(const CudaWeight& weight, int stage, int half, int row) {
    const int last = static_cast<int>(weight.slab_rows) - 16;
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
      const int first = min(row + tile * 64 + static_cast<int>(threadIdx.x / 32 % 4 * 16), last);
      const auto from = static_cast<const uint4*>(weight.fragments) + (stage * weight.slab_rows + first) * 8;
#pragma unroll
      for (int step = 2 * half; step < 2 * half + 2; ++step) {
        const uint4 four = ptx::load_streaming(from + step * 32 + threadIdx.x % 32);
        of_step[tile][step][0] = four.x;
        of_step[tile][step][1] = four.y;
        of_step[tile][step][2] = four.z;
        of_step[tile][step][3] = four.w;
      }
    }
  }
};

// A warpgroup that multiplies, and where it is in the rings.
template <class Tile>
struct Consumer {
  const Sm90Product& product;
  const Barriers<Tile>& barriers;
  uint32_t base;   // of shared memory
  int index, row;  // the block's which; its first row in the tile
  Ring<Tile::kStages> at{};
  Ring<Tile::kAtoms> atom{};
  // What was multiplied last, and may still be read by the instructions.
  uint32_t last_stage = 0, last_atom = 0;
  uint32_t residual_parities = 0;  // for the way out: one bit for each buffer

  SPARSEOPS_DEVICE void release_atom() const {
    const uint32_t thread = threadIdx.x % 128;
    if (thread < static_cast<uint32_t>(product.plan.cluster))
      ptx::mbarrier_arrive_cluster(barriers.empty_atom(last_atom), thread);
  }
  SPARSEOPS_DEVICE void release_stage() const {
    if (!Tile::kFromRegisters && threadIdx.x % 128 == 0) ptx::mbarrier_arrive(barriers.empty_stage(last_stage));
  }

  // The metadata of stage `stage`, which comes to slot `where`.
  SPARSEOPS_DEVICE void read(StageMetadata<Tile>& metadata, const Work& work, int stage,
                             const Ring<Tile::kStages>& where) const {
    if constexpr (Tile::kFromRegisters) {
      metadata.read_global(product.weight, stage, work.feature0 + row);
    } else {
      ptx::mbarrier_wait(barriers.full_metadata(where.slot), where.parity);
      metadata.read_shared(ptx::dynamic_shared() + Tile::kMetadataAt + where.slot * Tile::kMetadataBytes, row,
                           MetadataRows<Tile>(product.weight, work).count);
    }
  }

  // Multiplies stage i of the work; meanwhile reads from registers' sources what comes next, if anything does. On the
  // way out the second of the two groups of instructions is still under way.
  SPARSEOPS_DEVICE void multiply_stage(typename Tile::Sums& sums, const StageMetadata<Tile>& now,
                                       StageMetadata<Tile>& next, StageFragments<Tile>& fragments, const Work& work,
                                       int i) {
    const bool is_last = i + 1 == work.stages;
    const int stage = work.first_stage + i;
    if constexpr (!Tile::kFromRegisters) ptx::mbarrier_wait(barriers.full_values(at.slot), at.parity);
    const uint64_t a = ptx::descriptor_128b(base + at.slot * Tile::kValueBytes + row * 128);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::mbarrier_wait(barriers.full_atom(atom.slot), atom.parity);
      const uint64_t b = ptx::descriptor_128b(base + Tile::kAtomsAt + atom.slot * Tile::kAtomBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 2 * half; step < 2 * half + 2; ++step) {
#pragma unroll
        for (int tile = 0; tile < Tile::kRowTiles; ++tile)
          multiply_step(sums[tile], fragments.of_step[Tile::kFromRegisters ? tile : 0][step],
                        a + ((tile * 64 * 128 + step * 32) >> 4), b + ((step % 2 * 64) >> 4), now.word[tile][step],
                        i > 0 || step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (i > 0 || half > 0) release_atom();
      last_atom = atom.slot;
      atom.advance();
      if (half == 0) {
        if (i > 0) release_stage();
        last_stage = at.slot;
        at.advance();
        if (!is_last) read(next, work, stage + 1, at);
      }
      if constexpr (Tile::kFromRegisters)
        if (half == 0 || !is_last) fragments.read(product.weight, stage + half, 1 - half, work.feature0 + row);
    }
  }

  SPARSEOPS_DEVICE void multiply_step(typename Tile::acc_t (&sums)[Tile::kSums], const uint32_t (&fragment)[4],
                                      uint64_t a, uint64_t b, const uint32_t& metadata, bool add) const {
    if constexpr (Tile::kFromRegisters) {
      ptx::wgmma_sp<typename Tile::element_t, Tile::kTokens>(sums, fragment, b, metadata, add);
    } else {
      ptx::wgmma_sp<typename Tile::element_t, Tile::kTokens>(sums, a, b, metadata, add);
    }
  }

  SPARSEOPS_DEVICE void multiply(typename Tile::Sums& sums, const Work& work) {
    __syncwarp();                   // a thread may still be at its copies, and wgmma takes whole warps
    StageMetadata<Tile> even, odd;  // two, since that of a stage is in use while the next one is read
    StageFragments<Tile> fragments;
    read(even, work, work.first_stage, at);
    if constexpr (Tile::kFromRegisters) fragments.read(product.weight, work.first_stage, 0, work.feature0 + row);
    for (int i = 0;;) {
      multiply_stage(sums, even, odd, fragments, work, i);
      if (++i == work.stages) break;
      multiply_stage(sums, odd, even, fragments, work, i);
      if (++i == work.stages) break;
    }
    ptx::wgmma_wait<0>();
    release_atom();
    release_stage();
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) ptx::keep_in_registers(sums[tile]);
  }
};

}  // namespace sparseops
