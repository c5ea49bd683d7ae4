// Host side that the kernels for sm_90a share: the table of tiles, what they refuse, and how they are launched.
#pragma once
#include <climits>

#include "cuda/device.cuh"
#include "cuda/epilogue_sm90.cuh"
#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"
#include "ops.h"

namespace sparseops {

// f(Tile{}) with the tile of this shape, or a text where there is none for these elements.
template <class element_t, class F>
const char* with_sm90_tile(TileShape shape, F f) {
  switch (shape) {
    case TileShape::sm90_128x64:
      return f(Sm90Tile<element_t, 128, 64, 2, 6>{});
    case TileShape::sm90_128x128:
      return f(Sm90Tile<element_t, 128, 128, 2, 4>{});
    case TileShape::sm90_128x256:
      return f(Sm90Tile<element_t, 128, 256, 2, 3>{});
    case TileShape::sm90_256x128:
      return f(Sm90Tile<element_t, 256, 128, 2, 3>{});
    case TileShape::sm90_192x192:
      return f(Sm90Tile<element_t, 192, 192, 3, 3>{});
    default:
      return "this tile is none of this kernel's";
  }
}

template <class Tile>
const char* refuse_sm90(const CudaWeight& weight, const CudaEpilogue& epilogue, const CudaPlan& plan, int64_t tokens) {
  if (weight.rows % (16 / size_of(epilogue.dtype)) != 0) return "tiles of sm90 need rows of y of whole 16 bytes";
  if (weight.cols <= 0) return "tiles of sm90 need columns";
  if (!Tile::k8Bit && (epilogue.x_scale || epilogue.w_scale))
    return "tiles of sm90 take scales with 8-bit elements alone";
  if (!aligned(epilogue.residual, 16)) return "residual must begin at a multiple of 16 bytes";
  if (Tile::kFromRegisters && (!weight.fragments || !aligned(weight.fragments, 16)))
    return "tiles of sm90_rs need fragments, which begin at a multiple of 16 bytes";
  if (Tile::kFromRegisters && weight.slab_rows % 16 != 0) return "tiles of sm90_rs need slabs of a multiple of 16 rows";
  if (plan.cluster != 1 && !(plan.cluster == 2 && Tile::kTokens >= 64))
    return "cluster must be 1, or 2 for tiles of 64 tokens and more";
  if (plan.blocks < plan.cluster) return "blocks must be at least as many as a cluster has";
  const int64_t stages = ceil_div(weight.cols, Tile::kStageColumns);
  if (ceil_div(stages, ceil_div(stages, plan.splits)) != plan.splits) return "splits must leave none without a stage";
  // what the kernel counts in 32 bits
  const int64_t tiles = (ceil_div(weight.rows, Tile::kFeatures) + 1) * ceil_div(tokens, Tile::kTokens);
  if (tokens > INT_MAX - 512 || weight.rows > INT_MAX - 512 || tiles * plan.splits > INT_MAX)
    return "y must have fewer than 2^31 tokens, rows and splits of tiles";
  return nullptr;
}

// The parts of a product that do not depend on its activations.
template <class Tile>
const char* describe_product(Sm90Product* product, const CudaWeight& weight, const CudaEpilogue& epilogue,
                             const CudaPlan& plan, DType dtype, void* y, int64_t tokens) {
  constexpr int kElement = sizeof(typename Tile::element_t);
  product->weight = weight;
  product->epilogue = epilogue;
  product->plan = plan;
  product->tokens = tokens;
  product->stages = static_cast<int>(ceil_div(weight.cols, Tile::kStageColumns));
  const int64_t kept = weight.cols / 2, y_stride = weight.rows * size_of(epilogue.dtype);
  const int box_tokens = epilogue.dtype == DType::f32 ? Chunk<Tile, float>::kTokens : Chunk<Tile, __half>::kTokens;
  if (const char* error =
          encode_matrix(&product->values, dtype, weight.values, kept, weight.rows, kept * kElement, Tile::kFeatures))
    return error;
  const auto describe = [&](CUtensorMap* map, const void* data) {
    return encode_matrix(map, epilogue.dtype, data, weight.rows, tokens, y_stride, box_tokens);
  };
  if (epilogue.residual)
    if (const char* error = describe(&product->residual, epilogue.residual)) return error;
  return describe(&product->y, y);
}

template <class Tile, class Activations>
const char* launch_sm90(void (*kernel)(Sm90Product, Activations), const Sm90Product& product,
                        const Activations& activations) {
  const CudaPlan& plan = product.plan;
  const int64_t groups = ceil_div(ceil_div(product.weight.rows, Tile::kFeatures), plan.cluster);
  const int64_t units = groups * ceil_div(product.tokens, Tile::kTokens) * plan.splits;
  const auto clusters = static_cast<unsigned>(min(units, int64_t{plan.blocks / plan.cluster}));
  return cuda_error_text(launch_clusters(kernel, clusters * plan.cluster, Tile::kThreads, Tile::kSharedBytes,
                                         static_cast<unsigned>(plan.cluster), static_cast<cudaStream_t>(plan.stream),
                                         product, activations));
}

}  // namespace sparseops
