// From the sums of an output tile to y: the sums of several blocks added up, then scale, bias, residual, activation, one
// rounding, and stores that are next to their neighbours'.
//
//   y[t, m] = act(sum[t, m] * x_scale[t] * w_scale[m] + bias[m] + residual[t, m])
//
// mma.sp leaves two tokens of one feature in a thread, while y has the features of a token side by side. So the sums go
// through shared memory, in 32 bits, and come out four features to a thread.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "ops.h"

namespace sparseops {

// Elements from one token to the next in a tile in shared memory. In a store of fragments eight lanes lie along features
// and four along pairs of tokens; with the 4 they hit 32 different banks.
template <int kFeatures>
inline constexpr int kTilePitch = kFeatures + 4;

template <int kFeatures, int kTokens>
inline constexpr int kTileBytes = kTilePitch<kFeatures> * kTokens * 4;

// What one thread holds of a 16x8 tile of sums (PTX ISA, "Matrix fragments for mma.m16n8k16"): features g and g + 8 of
// tokens 2t and 2t + 1, where the lane is 4g + t. With another number of sums, what it holds after those of several
// warps were added up.
template <class acc_t, int kSums = 4>
struct alignas(kSums * sizeof(acc_t)) Fragment {
  acc_t sum[kSums];
};

// Puts a fragment whose first row is feature `feature` and whose first column is token `token` into the tile.
template <int kFeatures, class acc_t>
SPARSEOPS_DEVICE void stage_fragment(const Fragment<acc_t>& fragment, acc_t* tile, int feature, int token) {
  const unsigned lane = threadIdx.x % 32;
  acc_t* corner = tile + (token + lane % 4 * 2) * kTilePitch<kFeatures> + feature + lane / 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) corner[i % 2 * kTilePitch<kFeatures> + i / 2 * 8] = fragment.sum[i];
}

// Adds up the sums of the blocks that share an output tile. Each leaves its own in plan.partials and counts itself; the
// last one adds all of them, in the order of the splits, so that the result never depends on which was last. Returns
// whether this block is that one. All threads of the block have to call it.
template <int kFragments, class acc_t, int kSums>
SPARSEOPS_DEVICE bool reduce_splits(Fragment<acc_t, kSums> (&fragments)[kFragments], const CudaPlan& plan, int tile,
                                    int split) {
  using Part = Fragment<acc_t, kSums>;
  __shared__ uint32_t arrived;
  auto partials = static_cast<Part*>(plan.partials) + int64_t(tile) * plan.splits * kFragments * blockDim.x;
#pragma unroll
  for (int i = 0; i < kFragments; ++i) partials[(split * kFragments + i) * blockDim.x + threadIdx.x] = fragments[i];
  __syncthreads();
  if (threadIdx.x == 0) arrived = ptx::atomic_add_acq_rel(plan.counters + tile, 1);
  __syncthreads();
  if (arrived != plan.splits - 1u) return false;

  if (threadIdx.x == 0) plan.counters[tile] = 0;
#pragma unroll
  for (int i = 0; i < kFragments; ++i) fragments[i] = partials[i * blockDim.x + threadIdx.x];
  for (int other = 1; other < plan.splits; ++other) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const Part part = partials[(other * kFragments + i) * blockDim.x + threadIdx.x];
#pragma unroll
      for (int j = 0; j < kSums; ++j) fragments[i].sum[j] += part.sum[j];
    }
  }
  return true;
}

// Where a tile lies in y.
struct TileOfY {
  void* y;
  int64_t stride;             // elements from one token to the next
  int64_t token0, end_token;  // the tile's first token; the first that is not of the problem
  int feature0, end_feature;  // the same for features, whose row of weights is feature0
};

SPARSEOPS_DEVICE float activate(float z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z < 0 ? 0.f : z;  // keeps NaN, which fmaxf would not
    case Activation::silu:
      return z / (1 + expf(-z));
    case Activation::gelu:
      return 0.5f * z * (1 + erff(z * 0.70710678f));
    default:
      return z;
  }
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T element[4];
};

// Whether `count` neighbours at `first` can be moved as one vector.
template <class T>
SPARSEOPS_DEVICE bool are_vector(const T* first, int count) {
  return count == 4 && reinterpret_cast<uintptr_t>(first) % sizeof(Four<T>) == 0;
}

template <class T>
SPARSEOPS_DEVICE void load_four(float (&to)[4], const T* from, int count) {
  if (are_vector(from, count)) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = float(four.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < count ? float(from[i]) : 0.f;
  }
}

template <class T>
SPARSEOPS_DEVICE void store_four(T* to, const Four<T>& four, int count) {
  if (are_vector(to, count)) {
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = four.element[i];
  }
}

// Stores a tile of sums [token, kTilePitch] that the whole block has written and passed a barrier since.
template <class out_t, int kFeatures, int kTokens, int kThreads, class acc_t>
SPARSEOPS_DEVICE void store_tile_as(const CudaEpilogue& epilogue, const TileOfY& at, const acc_t* tile) {
  constexpr int kLanes = kFeatures / 4;
  static_assert(kThreads % kLanes == 0, "a thread keeps its features from token to token");
  const int in_tile = threadIdx.x % kLanes * 4, feature = at.feature0 + in_tile;
  const int count = min(4, at.end_feature - feature);
  if (count <= 0) return;

  const auto all_bias = static_cast<const out_t*>(epilogue.bias);
  const auto all_residual = static_cast<const out_t*>(epilogue.residual);
  float bias[4] = {0, 0, 0, 0}, w_scale[4] = {1, 1, 1, 1};
  if (all_bias) load_four(bias, all_bias + feature, count);
  if (epilogue.w_scale) load_four(w_scale, epilogue.w_scale + feature, count);

  for (int row = threadIdx.x / kLanes; row < kTokens; row += kThreads / kLanes) {
    const int64_t token = at.token0 + row;
    if (token >= at.end_token) break;
    const auto sums = *reinterpret_cast<const Fragment<acc_t>*>(tile + row * kTilePitch<kFeatures> + in_tile);
    const float x_scale = epilogue.x_scale ? epilogue.x_scale[token] : 1.f;
    const int64_t offset = token * at.stride + feature;
    float residual[4] = {0, 0, 0, 0};
    if (all_residual) load_four(residual, all_residual + offset, count);

    Four<out_t> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float z = float(sums.sum[i]) * (x_scale * w_scale[i]) + bias[i] + residual[i];
      result.element[i] = out_t(activate(z, epilogue.activation));
    }
    store_four(static_cast<out_t*>(at.y) + offset, result, count);
  }
}

template <int kFeatures, int kTokens, int kThreads, class acc_t>
SPARSEOPS_DEVICE void store_tile(const CudaEpilogue& epilogue, const TileOfY& at, const acc_t* tile) {
  switch (epilogue.dtype) {
    case DType::f16:
      return store_tile_as<__half, kFeatures, kTokens, kThreads>(epilogue, at, tile);
    case DType::bf16:
      return store_tile_as<__nv_bfloat16, kFeatures, kTokens, kThreads>(epilogue, at, tile);
    default:
      return store_tile_as<float, kFeatures, kTokens, kThreads>(epilogue, at, tile);
  }
}

}  // namespace sparseops
