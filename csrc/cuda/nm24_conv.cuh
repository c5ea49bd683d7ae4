// y[n, p, q, o] = act(sum_{r,s,c} x[n, h, v, c] * w[o, (r, s, c)] + bias[o] + residual[n, p, q, o]), w 2:4,
//   h = p * stride_h + r * dilation_h - pad_top, v likewise; c runs over the channels of o's group; x is 0 outside
//
//   x [batch, height, width, channels], w [rows, cols] as values and slabs, y [batch, out_height, out_width, rows]
//
// The product of mainloop.cuh, with output pixels as tokens: nothing is unfolded in memory, the loader finds the pixels
// under the taps. A chunk of 16 bytes is eight channels of one tap of one pixel, which is why x has its channels last
// and why those of a group should be a multiple of 8. Where they are only one of 4 a chunk is copied in two halves.
//
// Operations: pixels * rows * cols multiply-adds, of which half are done. Bytes: each tap reads x again, mostly from the
// cache.
// State: it has not yet run on a GPU; tests/emulation runs it on the CPU.
#pragma once
#include <climits>

#include "cuda/mainloop.cuh"

namespace sparseops {

// A column of the weight: channel c of tap (r, s).
struct Tap {
  int r, s, c;

  SPARSEOPS_DEVICE void start(const CudaNM24Conv& op, int channels, int column) {
    const int width = static_cast<int>(op.kernel_w), tap = column / channels;
    r = tap / width;
    s = tap % width;
    c = column % channels;
  }

  SPARSEOPS_DEVICE void advance(const CudaNM24Conv& op, int channels, int columns) {
    for (c += columns; c >= channels; c -= channels) {
      if (++s < op.kernel_w) continue;
      s = 0;
      ++r;
    }
  }
};

// The pixel of x under tap (0, 0) of an output pixel. It may lie outside.
struct Pixel {
  int index;  // in the batch
  int h, w;
};

// The taps' pixels under the output pixels that a tile takes. A thread copies one chunk of several rows and keeps where
// their pixels are; the tap moves on from step to step.
template <class Tile, int kCopyBytes>
struct PixelLoader {
  using element_t = typename Tile::element_t;
  static constexpr int kRows = Tile::kThreads / 8;  // copied at a time
  static constexpr int kCopies = 16 / kCopyBytes;   // to a chunk
  const CudaNM24Conv& op;
  int token0, tokens;
  int group, channels;  // of a group
  Pixel pixels[Tile::kTokens / kRows];
  Tap taps[kCopies];

  SPARSEOPS_DEVICE Pixel find(unsigned token) const {
    if (token >= unsigned(tokens)) return {0, INT_MIN / 2, 0};  // no tap brings it inside
    const unsigned out_width = static_cast<unsigned>(op.out_width), out_height = static_cast<unsigned>(op.out_height);
    const unsigned row = token / out_width, image = row / out_height;
    const int h = static_cast<int>(row % out_height * op.stride_h - op.pad_top);
    const int w = static_cast<int>(token % out_width * op.stride_w - op.pad_left);
    return {static_cast<int>((image * op.height + h) * op.width + w), h, w};
  }

  SPARSEOPS_DEVICE void start(int first_step) {
#pragma unroll
    for (int i = 0; i < Tile::kTokens / kRows; ++i) pixels[i] = find(token0 + threadIdx.x / 8 + i * kRows);
    const int column = first_step * Tile::kColumns + threadIdx.x % 8 * Tile::kChunk;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) taps[i].start(op, channels, column + i * (Tile::kChunk / kCopies));
  }

  SPARSEOPS_DEVICE void load(uint32_t to) {
    const auto x = static_cast<const element_t*>(op.x);
    const uint32_t chunk = to + x_at(threadIdx.x / 8, threadIdx.x % 8);
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      Tap& tap = taps[copy];
      const int h = tap.r * static_cast<int>(op.dilation_h), w = tap.s * static_cast<int>(op.dilation_w);
      const element_t* source = x + (int64_t(h) * op.width + w) * op.channels + group * channels + tap.c;
#pragma unroll
      for (int i = 0; i < Tile::kTokens / kRows; ++i) {
        const bool inside = tap.r < op.kernel_h && unsigned(pixels[i].h + h) < unsigned(op.height) &&
                            unsigned(pixels[i].w + w) < unsigned(op.width);
        ptx::cp_async<kCopyBytes>(chunk + i * kRows * 128 + copy * kCopyBytes,
                                  inside ? source + pixels[i].index * op.channels : x, inside ? kCopyBytes : 0);
      }
      tap.advance(op, channels, Tile::kColumns);
    }
  }
};

// Bounded as if by 384 threads, to 168 registers: with 128 the large tile would keep its pixels in local memory.
template <class Tile, int kCopyBytes>
__global__ void __launch_bounds__(384) nm24_conv_kernel(CudaNM24Conv op, CudaPlan plan) {
  const int group_rows = static_cast<int>(op.weight.rows / op.groups);
  const int group_tiles = (group_rows + Tile::kFeatures - 1) / Tile::kFeatures;
  const int tokens = static_cast<int>(op.batch * op.out_height * op.out_width);
  const TileIndex index(blockIdx.x, group_tiles * static_cast<int>(op.groups),
                        (tokens + Tile::kTokens - 1) / Tile::kTokens);
  const int group = index.feature / group_tiles, in_group = index.feature % group_tiles * Tile::kFeatures;
  const int row0 = group * group_rows + in_group, end_row = (group + 1) * group_rows;
  const int slot0 = group * ((group_rows + 15) / 16 * 16) + in_group;
  const int token0 = index.token * Tile::kTokens;

  PixelLoader<Tile, kCopyBytes> x{op, token0, tokens, group, static_cast<int>(op.channels / op.groups), {}, {}};
  compute_tile<Tile>(op.weight, {row0, end_row, slot0}, x, op.epilogue,
                     {op.y, op.weight.rows, token0, tokens, row0, end_row}, plan, blockIdx.x);
}

}  // namespace sparseops
