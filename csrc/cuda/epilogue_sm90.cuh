// From the sums of an output tile to y on sm_90a: the sums of several splits added up, then scale, bias, residual,
// activation, one rounding, and stores by the copy engine, which go on while the next tile is multiplied.
//
//   y[t, m] = act(sum[t, m] * x_scale[t] * w_scale[m] + bias[m] + residual[t, m])
//
// wgmma leaves two tokens of one feature in a thread, while y has the features of a token side by side. Each consumer
// turns its 64 features round by itself, a few tokens at a time, in a buffer of shared memory laid out as the copy engine
// swizzles it: rows of 128 bytes are a token's 64 features in 16 bits (stmatrix transposes), or 32 of them in f32. What
// is added to y comes in the same way beforehand. No two threads of a store meet in a bank.
#pragma once
#include "cuda/epilogue.cuh"
#include "cuda/mainloop_sm90.cuh"

namespace sparseops {

// The barrier of a consumer's four warps.
SPARSEOPS_DEVICE void consumer_barrier() { ptx::named_barrier(threadIdx.x / 128, 128); }

// As reduce_splits (epilogue.cuh), for one consumer, whose counter and flag are its own.
template <class Tile>
SPARSEOPS_DEVICE bool reduce_consumer_splits(typename Tile::Sums& sums, const Consumer<Tile>& consumer,
                                             const Work& work) {
  using Part = Fragment<typename Tile::acc_t>;
  constexpr int kParts = sizeof(sums) / sizeof(Part);
  const CudaPlan& plan = consumer.product.plan;
  const int thread = threadIdx.x % 128;
  const int64_t first = int64_t{work.tile} * plan.splits;
  auto* const all = sums[0];
  auto partials = static_cast<Part*>(plan.partials) + thread;
  const auto part_of = [&](int split, int i) {
    return partials + (((first + split) * Tile::kConsumers + consumer.index) * kParts + i) * 128;
  };
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    Part part;
#pragma unroll
    for (int j = 0; j < 4; ++j) part.sum[j] = all[4 * i + j];
    *part_of(work.split, i) = part;
  }

  auto arrived = reinterpret_cast<uint32_t*>(ptx::dynamic_shared() + Tile::kArrivedAt) + consumer.index;
  uint32_t* counter = plan.counters + int64_t{work.tile} * Tile::kConsumers + consumer.index;
  consumer_barrier();
  if (thread == 0) *arrived = ptx::atomic_add_acq_rel(counter, 1);
  consumer_barrier();
  if (*arrived != plan.splits - 1u) return false;

  if (thread == 0) *counter = 0;
  // A few at a time: all at once would want twice the registers. Registers cannot be indexed, so what is done moves to the
  // end, and the next ones come to stand before it.
  constexpr int kAtOnce = kParts < 8 ? kParts : 8, kSums = kParts * 4;
#pragma unroll 1
  for (int first_part = 0; first_part < kParts; first_part += kAtOnce) {
    Part group[kAtOnce] = {};
#pragma unroll 1
    for (int split = 0; split < plan.splits; ++split) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const Part part = *part_of(split, first_part + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) group[i].sum[j] += part.sum[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kSums - 4 * kAtOnce; ++i) all[i] = all[i + 4 * kAtOnce];
#pragma unroll
    for (int i = 0; i < 4 * kAtOnce; ++i) all[kSums - 4 * kAtOnce + i] = group[i / 4].sum[i % 4];
  }
  return true;
}

// One buffer's worth of y: 64 features by kTokens tokens, in boxes of 128 bytes a token.
template <class Tile, class out_t>
struct Chunk {
  static constexpr bool kWide = sizeof(out_t) == 4;  // then two boxes of 32 features
  static constexpr int kTokens = Tile::kTokens < 32 ? (kWide && Tile::kTokens > 16 ? 16 : Tile::kTokens)
                                 : kWide            ? 16
                                                    : 32;
  static constexpr int kBoxes = kWide ? 2 : 1, kBoxFeatures = 64 / kBoxes, kBoxBytes = kTokens * 128;
  static_assert(kBoxes * kBoxBytes <= Tile::kBufferBytes && kBoxBytes % 1024 == 0);

  // Where an element of f32 lies.
  static SPARSEOPS_DEVICE uint32_t wide_at(int token, int feature) {
    const int in_box = feature % 32;
    return feature / 32 * kBoxBytes + token * 128 + ((in_box / 4 ^ token % 8) * 16) + in_box % 4 * 4;
  }
  // Where a lane's row of the matrices of 8 tokens by 8 features begins, for 16 features of a warp and tokens from
  // `token` on: matrices 0 and 1 are the first 8 tokens, 2 and 3 the next.
  static SPARSEOPS_DEVICE uint32_t narrow_at(int token) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int row = token + lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
    return row * 128 + ((chunk ^ row % 8) * 16);
  }
};

template <class out_t>
SPARSEOPS_DEVICE uint32_t pack(float low, float high) {
  union {
    out_t element[2];
    uint32_t word;
  } both;
  both.element[0] = out_t(low);
  both.element[1] = out_t(high);
  return both.word;
}
template <class out_t>
SPARSEOPS_DEVICE void unpack(uint32_t word, float& low, float& high) {
  union {
    uint32_t word;
    out_t element[2];
  } both;
  both.word = word;
  low = float(both.element[0]);
  high = float(both.element[1]);
}

// What a thread adds to and multiplies its sums with: those of its two features in a row tile.
struct FeatureTerms {
  float bias[2] = {0, 0}, scale[2] = {1, 1};

  template <class Tile, class out_t>
  SPARSEOPS_DEVICE void load(const CudaEpilogue& epilogue, int feature, int end) {
    const auto all_bias = static_cast<const out_t*>(epilogue.bias);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (feature + 8 * i >= end) break;
      if (all_bias) bias[i] = float(all_bias[feature + 8 * i]);
      if (Tile::k8Bit && epilogue.w_scale) scale[i] = epilogue.w_scale[feature + 8 * i];
    }
  }
};

// The activation is chosen outside, once for a tile. None and relu are one comparison. Division and exponential are the
// quick ones, right to 2^-21 or so.
template <Activation kActivation>
SPARSEOPS_DEVICE float activate_as(float z, Activation activation) {
  if constexpr (kActivation == Activation::silu) return __fdividef(z, 1 + __expf(-z));
  if constexpr (kActivation == Activation::gelu) return activate(z, Activation::gelu);
  return activation == Activation::relu && z < 0 ? 0.f : z;
}

// The way out of a tile for one consumer. kActivation: none stands for relu as well.
template <class Tile, class out_t, Activation kActivation>
struct TileStore {
  using Part = Chunk<Tile, out_t>;
  using acc_t = typename Tile::acc_t;
  static constexpr int kChunks = Tile::kTokens / Part::kTokens, kAllChunks = Tile::kRowTiles * kChunks;
  // Registers cannot be indexed, so either the code is there once for each chunk, or each chunk's sums move to where the
  // first ones were: an eighth of the code, and cheaper than the arithmetic of silu and gelu.
  static constexpr bool kMoves = kActivation != Activation::none || Part::kWide;
  static constexpr int kUnrolled = kMoves ? 1 : kAllChunks;

  Consumer<Tile>& consumer;
  const Sm90Product& product;
  const Work& work;
  int feature0;  // of the consumer
  bool leads;    // the thread that asks for copies

  SPARSEOPS_DEVICE TileStore(Consumer<Tile>& of, const Work& work)
      : consumer(of),
        product(of.product),
        work(work),
        feature0(work.feature0 + of.row),
        leads(threadIdx.x % 128 == 0) {}

  SPARSEOPS_DEVICE int buffer_of(int chunk) const { return chunk % Tile::kBuffers; }
  SPARSEOPS_DEVICE unsigned char* buffer(int index) const {
    return ptx::dynamic_shared() + Tile::kBuffersAt + (consumer.index * Tile::kBuffers + index) * Tile::kBufferBytes;
  }

  // The copy engine's way between a buffer and the `chunk`-th part of the consumer's features.
  template <class F>
  SPARSEOPS_DEVICE void each_box(int chunk, F f) const {
    const int feature = feature0 + chunk / kChunks * 64, token = work.token0 + chunk % kChunks * Part::kTokens;
    const uint32_t at = ptx::shared_address(buffer(buffer_of(chunk)));
#pragma unroll
    for (int box = 0; box < Part::kBoxes; ++box)
      f(at + box * Part::kBoxBytes, feature + box * Part::kBoxFeatures, token);
  }

  SPARSEOPS_DEVICE uint32_t residual_bar(int index) const {
    return consumer.barriers.residual(consumer.index * Tile::kBuffers + index);
  }

  // Fetches what is added to a part of y into its buffer, once y has left that. The first part's was asked for before.
  SPARSEOPS_DEVICE void fetch_residual(int chunk) const {
    ptx::bulk_wait_read<0>();
    const uint32_t bar = residual_bar(buffer_of(chunk));
    ptx::mbarrier_arrive_expect_tx(bar, Part::kBoxes * Part::kBoxBytes);
    each_box(chunk, [&](uint32_t at, int feature, int token) {
      ptx::tma_load<2>(at, &product.residual, bar, {feature, token}, ptx::L2Policy::evict_first);
    });
  }

  SPARSEOPS_DEVICE float finish(float sum, float scale, float bias, float residual) const {
    return activate_as<kActivation>(sum * scale + bias + residual, product.epilogue.activation);
  }

  // What a thread has of 8 tokens: features g and g + 8 of its warp, tokens 2t and 2t + 1.
  SPARSEOPS_DEVICE void finish_four(float (&y)[4], const acc_t* sums, const float (&residual)[4],
                                    const FeatureTerms& terms, const float (&x_scale)[2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      y[i] = finish(float(sums[i]), x_scale[i % 2] * terms.scale[i / 2], terms.bias[i / 2], residual[i]);
  }

  SPARSEOPS_DEVICE void load_x_scale(float (&x_scale)[2], int64_t token) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = Tile::k8Bit && product.epilogue.x_scale && token + i < product.tokens;
      x_scale[i] = exists ? product.epilogue.x_scale[token + i] : 1.f;
    }
  }

  // kTokens x 64 in 16 bits, 16 tokens at a time (8 where the tile has no more).
  SPARSEOPS_DEVICE void write_narrow(const acc_t* sums, unsigned char* to, int64_t token0,
                                     const FeatureTerms& terms) const {
    constexpr int kMatrices = Part::kTokens == 8 ? 2 : 4;
    const uint32_t base = ptx::shared_address(to);
#pragma unroll
    for (int token = 0; token < Part::kTokens; token += 4 * kMatrices) {
      const uint32_t at = base + Part::narrow_at(token);
      uint32_t words[kMatrices] = {};
      if (product.epilogue.residual) {
        uint32_t four[4];
        ptx::ldmatrix_x4<true>(four, at);
#pragma unroll
        for (int i = 0; i < kMatrices; ++i) words[i] = four[i];
      }
#pragma unroll
      for (int i = 0; i < kMatrices; i += 2) {
        float y[4], residual[4] = {0, 0, 0, 0}, x_scale[2];
        if (product.epilogue.residual) {
          unpack<out_t>(words[i], residual[0], residual[1]);
          unpack<out_t>(words[i + 1], residual[2], residual[3]);
        }
        load_x_scale(x_scale, token0 + token + i * 4 + threadIdx.x % 4 * 2);
        finish_four(y, sums + (token + i * 4) / 2, residual, terms, x_scale);
        words[i] = pack<out_t>(y[0], y[1]);
        words[i + 1] = pack<out_t>(y[2], y[3]);
      }
      ptx::stmatrix<kMatrices, true>(at, words);
    }
  }

  SPARSEOPS_DEVICE void write_wide(const acc_t* sums, unsigned char* to, int64_t token0,
                                   const FeatureTerms& terms) const {
    const int feature = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, first = threadIdx.x % 4 * 2;
#pragma unroll
    for (int token = 0; token < Part::kTokens; token += 8) {
      float y[4], residual[4] = {0, 0, 0, 0}, x_scale[2];
      const auto at = [&](int i) {
        return reinterpret_cast<float*>(to + Part::wide_at(token + first + i % 2, feature + i / 2 * 8));
      };
      if (product.epilogue.residual) {
#pragma unroll
        for (int i = 0; i < 4; ++i) residual[i] = *at(i);
      }
      load_x_scale(x_scale, token0 + token + first);
      finish_four(y, sums + token / 2, residual, terms, x_scale);
#pragma unroll
      for (int i = 0; i < 4; ++i) *at(i) = y[i];
    }
  }

  SPARSEOPS_DEVICE void run(typename Tile::Sums& sums) {
    const bool adds = product.epilogue.residual;
    acc_t* const all = sums[0];
#pragma unroll kUnrolled
    for (int chunk = 0; chunk < kAllChunks; ++chunk) {
      const int index = buffer_of(chunk), row_tile = chunk / kChunks, token = chunk % kChunks * Part::kTokens;
      if (adds) {
        // The next part's residual needs the other buffer, or waits for this part to be out.
        if (Tile::kBuffers > 1 && leads && chunk + 1 < kAllChunks) fetch_residual(chunk + 1);
        ptx::mbarrier_wait(residual_bar(index), consumer.residual_parities >> index & 1);
        consumer.residual_parities ^= 1u << index;
      } else {
        if (leads) ptx::bulk_wait_read<Tile::kBuffers - 1>();
        consumer_barrier();
      }
      FeatureTerms terms;
      terms.template load<Tile, out_t>(product.epilogue,
                                       feature0 + row_tile * 64 + int(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4),
                                       static_cast<int>(product.weight.rows));
      const acc_t* const part = all + (kMoves ? 0 : chunk * Part::kTokens / 2);
      if constexpr (Part::kWide) {
        write_wide(part, buffer(index), work.token0 + token, terms);
      } else {
        write_narrow(part, buffer(index), work.token0 + token, terms);
      }
      ptx::fence_proxy_async();
      consumer_barrier();
      if (leads) {
        each_box(chunk, [&](uint32_t at, int feature, int token) { ptx::tma_store(&product.y, at, {feature, token}); });
        ptx::bulk_commit();
        if (adds && Tile::kBuffers == 1 && chunk + 1 < kAllChunks) fetch_residual(chunk + 1);
      }
      if constexpr (kMoves) {
#pragma unroll
        for (int i = 0; i + Part::kTokens / 2 < Tile::kRowTiles * Tile::kSums; ++i) all[i] = all[i + Part::kTokens / 2];
      }
    }
  }
};

// Asks for the first part of what is added to a tile. Early, before the product, it has come by the time it is wanted.
template <class Tile>
SPARSEOPS_DEVICE void fetch_first_residual(Consumer<Tile>& consumer, const Work& work) {
  if (!consumer.product.epilogue.residual || threadIdx.x % 128 != 0) return;
  if (consumer.product.epilogue.dtype == DType::f32) {
    TileStore<Tile, float, Activation::none>(consumer, work).fetch_residual(0);
  } else {
    TileStore<Tile, __half, Activation::none>(consumer, work).fetch_residual(0);
  }
}

template <class out_t, class Tile>
SPARSEOPS_DEVICE void store_sums_as(typename Tile::Sums& sums, Consumer<Tile>& consumer, const Work& work) {
  switch (consumer.product.epilogue.activation) {
    case Activation::silu:
      return TileStore<Tile, out_t, Activation::silu>(consumer, work).run(sums);
    case Activation::gelu:
      return TileStore<Tile, out_t, Activation::gelu>(consumer, work).run(sums);
    default:
      return TileStore<Tile, out_t, Activation::none>(consumer, work).run(sums);
  }
}

template <class Tile>
SPARSEOPS_DEVICE void store_sums(typename Tile::Sums& sums, Consumer<Tile>& consumer, const Work& work) {
  const DType dtype = consumer.product.epilogue.dtype;
  if (dtype == DType::f32) return store_sums_as<float>(sums, consumer, work);
  if constexpr (Tile::k8Bit) {
    if (dtype == DType::f16) return store_sums_as<__half>(sums, consumer, work);
    store_sums_as<__nv_bfloat16>(sums, consumer, work);
  } else {
    store_sums_as<typename Tile::element_t>(sums, consumer, work);
  }
}

// A block's memory must last for as long as the other one of its cluster may write to it.
SPARSEOPS_DEVICE void leave_cluster() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// The kernel: all blocks, from beginning to end.
template <class Tile, class Activations>
SPARSEOPS_DEVICE void compute_product(const Sm90Product& product, const Activations& activations) {
  const uint32_t base = ptx::shared_address(ptx::dynamic_shared());
  const Barriers<Tile> barriers{base + Tile::kBarriersAt};
  const int rank = static_cast<int>(ptx::cluster_rank());
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&product.values);
    ptx::prefetch_tensormap(&activations.map);
    ptx::prefetch_tensormap(&product.y);
    barriers.init(product.plan.cluster);
  }
  ptx::wait_for_predecessor();
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (threadIdx.x < 128) {
    ptx::decrease_registers<Tile::kCopierRegisters>();
    if (threadIdx.x < 32 && ptx::elect_one()) {
      copy_tiles<Tile>(product, activations, base, barriers, rank);
      ptx::let_successor_start();
    }
    __syncwarp();
    leave_cluster();
  } else {
    ptx::increase_registers<Tile::kConsumerRegisters>();
    // Shuffled, so that the compiler knows that it is the same in all lanes: what follows from it can then be kept in
    // uniform registers, where instructions want their descriptors.
    const int index = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0) - 1;
    Consumer<Tile> consumer{product, barriers, base, index, index * Tile::kConsumerRows};
    Schedule<Tile> schedule(product, rank);
    Work work;
    while (schedule.take(work)) {
      const bool whole = product.plan.splits == 1;
      if (whole && work.exists) fetch_first_residual(consumer, work);
      typename Tile::Sums sums;
      consumer.multiply(sums, work);
      if (!work.exists) continue;
      if (!whole) {
        if (!reduce_consumer_splits(sums, consumer, work)) continue;
        fetch_first_residual(consumer, work);
      }
      store_sums(sums, consumer, work);
    }
    if (threadIdx.x % 128 == 0) ptx::bulk_wait<0>();
    __syncwarp();
    leave_cluster();
  }
}

}  // namespace sparseops
