// Host side of nm24_linear_sm90.cuh: checks what the kernel assumes, describes the tensors, launches. One file for each
// type of element makes it, since the kernels take the compiler a while.
#pragma once
#include "cuda/launch_sm90.cuh"
#include "cuda/nm24_linear_sm90.cuh"
#include "cuda/sm90.h"

namespace sparseops {

template <class Tile>
const char* launch_linear_tile(const CudaNM24Linear& op, const CudaPlan& plan) {
  constexpr int kElement = sizeof(typename Tile::element_t);
  if (const char* refused = refuse_sm90<Tile>(op.weight, op.epilogue, plan, op.tokens)) return refused;
  if (op.tokens > 1 && op.x_stride < op.in_features) return "nm24_linear: rows of x must not overlap";
  Sm90Product product{};
  if (const char* error = describe_product<Tile>(&product, op.weight, op.epilogue, plan, op.dtype, op.y, op.tokens))
    return error;
  Sm90Rows x;
  x.atom_columns = Tile::kAtomColumns;
  if (const char* error = encode_matrix(&x.map, op.dtype, op.x, op.in_features, op.tokens, op.x_stride * kElement,
                                        Tile::kTokens / plan.cluster))
    return error;
  return launch_sm90<Tile>(nm24_linear_sm90_kernel<Tile>, product, x);
}

template <class element_t>
const char* launch_linear_sm90(const CudaNM24Linear& op, const CudaPlan& plan) {
  if constexpr (sizeof(element_t) == 2) {
    switch (plan.tile) {
      case TileShape::sm90_128x8:
        return launch_linear_tile<Sm90Tile<element_t, 128, 8, 2, 9>>(op, plan);
      case TileShape::sm90_128x16:
        return launch_linear_tile<Sm90Tile<element_t, 128, 16, 2, 9>>(op, plan);
      case TileShape::sm90_128x32:
        return launch_linear_tile<Sm90Tile<element_t, 128, 32, 2, 8>>(op, plan);
      case TileShape::sm90_rs_128x256:
        return launch_linear_tile<Sm90Tile<element_t, 128, 256, 2, 2, true>>(op, plan);
      case TileShape::sm90_rs_256x128:
        return launch_linear_tile<Sm90Tile<element_t, 256, 128, 2, 2, true>>(op, plan);
      default:
        break;
    }
  }
  return with_sm90_tile<element_t>(plan.tile, [&](auto tile) { return launch_linear_tile<decltype(tile)>(op, plan); });
}

}  // namespace sparseops
