// The order in which blocks take output tiles.
#pragma once
#include "cuda/ptx.cuh"

namespace sparseops {

// Blocks that run at the same time should share both operands in the cache: eight rows of token tiles are gone through
// together, feature tile by feature tile.
struct TileIndex {
  int feature, token;

  SPARSEOPS_DEVICE TileIndex(int block, int feature_tiles, int token_tiles) {
    constexpr int kTogether = 8;
    const int first = block / (kTogether * feature_tiles) * kTogether;
    const int rows = min(kTogether, token_tiles - first), within = block - first * feature_tiles;
    feature = within / rows;
    token = first + within % rows;
  }
};

}  // namespace sparseops
