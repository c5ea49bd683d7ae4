// nm24_conv through its host code, against float64: what the tests of its kernels share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <string>
#include <vector>

#include "ops.h"
#include "test_support.h"

namespace sparseops {

struct Pair {
  int64_t h = 1, w = 1;
};

// Channels are those of one group; `filled` of them hold data, the rest up to a multiple of 4 are padding.
struct Shape {
  int batch = 1;
  Pair image{8, 8};
  int channels = 16, rows = 16;
  Pair kernel{3, 3}, stride{1, 1}, pad{1, 1}, dilation{1, 1};
  int groups = 1;
  int more_padding = 0;  // rows and columns more at the bottom and at the right than `pad`
};

struct Options {
  TileShape tile = TileShape::small;
  int splits = 1;
  Activation activation = Activation::none;
  bool bias = true, residual = false;
  int cluster = 1, blocks = 2;
  int nan_pixel = -1;  // one that is not a number
};

inline int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t more) {
  return (size + 2 * pad + more - dilation * (kernel - 1) - 1) / stride + 1;
}

template <class T, class out_t>
void convolve(const Shape& s, const Options& options) {
  const int64_t channels = s.channels * s.groups, rows = s.rows * s.groups;
  const int64_t out_h = out_size(s.image.h, s.kernel.h, s.stride.h, s.pad.h, s.dilation.h, s.more_padding);
  const int64_t out_w = out_size(s.image.w, s.kernel.w, s.stride.w, s.pad.w, s.dilation.w, s.more_padding);
  const int64_t used = s.kernel.h * s.kernel.w * s.channels, cols = (used + 31) / 32 * 32;
  const int64_t tokens = s.batch * out_h * out_w;
  emu::Random random(rows * 1009 + channels * 31 + out_w);
  const emu::Weight<T> w(rows, cols, random, s.groups);
  emu::Buffer<T> x = random.normal<T>(s.batch * s.image.h * s.image.w * channels);
  for (int64_t c = 0; options.nan_pixel >= 0 && c < channels; ++c) x[options.nan_pixel * channels + c] = T(NAN);
  const emu::Buffer<out_t> bias = random.normal<out_t>(rows), residual = random.normal<out_t>(tokens * rows);
  emu::Buffer<out_t> y(tokens * rows);

  int count = 0;
  const CudaTile& tile = cuda_tiles(&count)[static_cast<int>(options.tile)];
  const int64_t tiles =
      (s.rows + tile.features - 1) / tile.features * s.groups * ((tokens + tile.tokens - 1) / tile.tokens);
  const bool split = options.splits > 1;
  emu::Buffer<float> partials(split ? tiles * options.splits * tile.features * tile.tokens : 0);
  emu::Buffer<uint32_t> counters(split ? tiles * tile.consumers : 0);
  counters.fill(0);

  CudaNM24Conv op{};
  op.x = x.data();
  op.weight = {w.values.data(), w.slabs.data(), rows, cols, w.slab_rows, nullptr};
  op.epilogue = {options.bias ? bias.data() : nullptr,
                 options.residual ? residual.data() : nullptr,
                 nullptr,
                 nullptr,
                 std::is_same_v<out_t, float> ? DType::f32
                 : std::is_same_v<T, __half>  ? DType::f16
                                              : DType::bf16,
                 options.activation};
  op.y = y.data();
  op.batch = s.batch, op.channels = channels;
  op.height = s.image.h, op.width = s.image.w, op.out_height = out_h, op.out_width = out_w;
  op.kernel_h = s.kernel.h, op.kernel_w = s.kernel.w, op.stride_h = s.stride.h, op.stride_w = s.stride.w;
  op.pad_top = s.pad.h, op.pad_left = s.pad.w, op.dilation_h = s.dilation.h, op.dilation_w = s.dilation.w;
  op.groups = s.groups;
  op.dtype = std::is_same_v<T, __half> ? DType::f16 : DType::bf16;
  emu::require(cuda_nm24_conv(op, {options.tile, options.splits, options.cluster, options.blocks, partials.data(),
                                   counters.data(), 0, nullptr}));

  std::vector<double> expected(tokens * rows), size(tokens * rows);
  for (int64_t i = 0; i < tokens * rows; ++i) {
    const int64_t o = i % rows, q = i / rows % out_w, p = i / rows / out_w % out_h, n = i / rows / out_w / out_h;
    double sum = 0, terms = 0;
    for (int64_t r = 0; r < s.kernel.h; ++r) {
      for (int64_t v = 0; v < s.kernel.w; ++v) {
        const int64_t h = p * s.stride.h + r * s.dilation.h - s.pad.h, u = q * s.stride.w + v * s.dilation.w - s.pad.w;
        if (h < 0 || h >= s.image.h || u < 0 || u >= s.image.w) continue;
        for (int64_t c = 0; c < s.channels; ++c) {
          const double weight = w.dense[o * cols + (r * s.kernel.w + v) * s.channels + c];
          if (weight == 0) continue;  // or meets a NaN that no kernel reads
          const double term =
              weight *
              emu::to_double(x[((n * s.image.h + h) * s.image.w + u) * channels + o / s.rows * s.channels + c]);
          sum += term;
          terms += std::fabs(term);
        }
      }
    }
    if (options.bias) sum += emu::to_double(bias[o]);
    if (options.residual) sum += emu::to_double(residual[i]);
    expected[i] = options.activation == Activation::relu ? std::max(sum, 0.0) : sum;
    size[i] = terms + std::fabs(sum) + 4;
  }
  emu::expect_close(y, expected, size);
  for (std::size_t i = 0; i < counters.size(); ++i)
    if (counters[i] != 0) throw emu::Error("a counter is not zero after the launch");
}

}  // namespace sparseops
