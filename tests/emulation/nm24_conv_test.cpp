// kernels: nm24_conv nm24_linear
// nm24_conv through its host code, against float64.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <string>
#include <vector>

#include "ops.h"
#include "test_support.h"

using namespace sparseops;

namespace {

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
};

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t more) {
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
  const emu::Buffer<T> x = random.normal<T>(s.batch * s.image.h * s.image.w * channels);
  const emu::Buffer<out_t> bias = random.normal<out_t>(rows), residual = random.normal<out_t>(tokens * rows);
  emu::Buffer<out_t> y(tokens * rows);

  int count = 0;
  const CudaTile& tile = cuda_tiles(&count)[static_cast<int>(options.tile)];
  const int64_t tiles =
      (s.rows + tile.features - 1) / tile.features * s.groups * ((tokens + tile.tokens - 1) / tile.tokens);
  const bool split = options.splits > 1;
  emu::Buffer<float> partials(split ? tiles * options.splits * tile.features * tile.tokens : 0);
  emu::Buffer<uint32_t> counters(split ? tiles : 0);
  counters.fill(0);

  CudaNM24Conv op{};
  op.x = x.data();
  op.weight = {w.values.data(), w.slabs.data(), rows, cols, w.slab_rows};
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
  emu::require(cuda_nm24_conv(op, {options.tile, options.splits, partials.data(), counters.data(), 0, nullptr}));

  std::vector<double> expected(tokens * rows), size(tokens * rows);
  for (int64_t i = 0; i < tokens * rows; ++i) {
    const int64_t o = i % rows, q = i / rows % out_w, p = i / rows / out_w % out_h, n = i / rows / out_w / out_h;
    double sum = 0, terms = 0;
    for (int64_t r = 0; r < s.kernel.h; ++r) {
      for (int64_t v = 0; v < s.kernel.w; ++v) {
        const int64_t h = p * s.stride.h + r * s.dilation.h - s.pad.h, u = q * s.stride.w + v * s.dilation.w - s.pad.w;
        if (h < 0 || h >= s.image.h || u < 0 || u >= s.image.w) continue;
        for (int64_t c = 0; c < s.channels; ++c) {
          const double term =
              emu::to_double(x[((n * s.image.h + h) * s.image.w + u) * channels + o / s.rows * s.channels + c]) *
              w.dense[o * cols + (r * s.kernel.w + v) * s.channels + c];
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

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  const TileShape kLarge = TileShape::large;
  const auto half = [&](const char* name, const Shape& shape, const Options& options = {}) {
    tests.run(std::string("f16 ") + name, [=] { convolve<__half, __half>(shape, options); });
  };

  // Whole tiles, and as many channels as a step has columns: copies of 128 bytes side by side.
  for (TileShape tile : {TileShape::small, kLarge}) {
    const int rows = tile == kLarge ? 128 : 64;
    tests.run("f16 whole tiles of %d", rows, [=] {
      convolve<__half, __half>({.image = {8, 16}, .channels = 64, .rows = rows}, {.tile = tile});
      emu::expect_ideal_traffic({});
    });
  }

  // The numbers the code divides by: channels of a tap (chunks of 8, or halves of 4; steps of 64), taps, output pixels
  // and images (tiles of 64 and 128), rows of a group (16 slots, tiles of 64 and 128).
  for (int channels : {4, 8, 12, 16, 20, 24, 28, 40, 56, 60, 64, 68, 72, 80, 96, 120, 128, 136})
    tests.run("f16 channels=%d", channels,
              [=] { convolve<__half, __half>({.image = {5, 6}, .channels = channels, .rows = 9}, {}); });
  for (int channels : {4, 12, 16, 64, 72})
    tests.run("f16 one by five, channels=%d", channels, [=] {
      convolve<__half, __half>({.image = {3, 11}, .channels = channels, .kernel = {1, 5}, .pad = {0, 2}}, {});
    });
  for (int rows : {1, 4, 7, 15, 17, 63, 65})
    tests.run("bf16 rows=%d", rows,
              [=] { convolve<__nv_bfloat16, __nv_bfloat16>({.image = {4, 4}, .channels = 8, .rows = rows}, {}); });
  for (int width : {1, 2, 7, 31, 32, 33})
    tests.run("f16 width=%d", width,
              [=] { convolve<__half, __half>({.batch = 2, .image = {2, width}, .channels = 8, .rows = 5}, {}); });
  half("a pixel more than a tile", {.image = {5, 13}, .channels = 8, .rows = 5});
  half("a pixel more than a large tile", {.image = {3, 43}, .channels = 8, .rows = 5}, {.tile = kLarge});
  for (int height : {1, 3, 8})
    tests.run("f16 height=%d", height,
              [=] { convolve<__half, __half>({.batch = 3, .image = {height, 5}, .channels = 8, .rows = 5}, {}); });

  half("stride", {.image = {11, 10}, .channels = 16, .stride = {2, 3}, .pad = {0, 2}});
  half("dilation", {.image = {11, 12}, .channels = 16, .pad = {2, 3}, .dilation = {2, 3}});
  half("stride and dilation, large",
       {.batch = 2, .image = {13, 12}, .channels = 8, .rows = 40, .stride = {3, 2}, .dilation = {3, 2}},
       {.tile = kLarge});
  half("more padding at the end", {.image = {5, 6}, .channels = 8, .kernel = {2, 4}, .pad = {0, 1}, .more_padding = 1});
  half("padding wider than the image", {.image = {3, 2}, .channels = 8, .rows = 4, .pad = {9, 11}});
  half("kernel is image", {.batch = 2, .image = {4, 5}, .channels = 8, .rows = 6, .kernel = {4, 5}, .pad = {0, 0}});
  half("column kernel", {.image = {9, 4}, .channels = 12, .rows = 10, .kernel = {5, 1}, .pad = {2, 0}});
  half("seven by seven, stride 2",
       {.image = {15, 14}, .channels = 4, .kernel = {7, 7}, .stride = {2, 2}, .pad = {3, 3}});
  half("pointwise", {.batch = 2, .image = {5, 7}, .channels = 24, .rows = 20, .kernel = {1, 1}, .pad = {0, 0}});
  half("pointwise, 12 channels", {.image = {5, 7}, .channels = 12, .rows = 20, .kernel = {1, 1}, .pad = {0, 0}});
  half("pointwise, stride 2", {.image = {5, 7}, .channels = 24, .kernel = {1, 1}, .stride = {2, 2}, .pad = {0, 0}});
  half("pointwise, padded", {.image = {5, 7}, .channels = 24, .kernel = {1, 1}});
  half("pointwise, stride over one pixel",
       {.batch = 3, .image = {1, 1}, .channels = 16, .kernel = {1, 1}, .stride = {2, 2}, .pad = {0, 0}});

  half("groups", {.batch = 2, .image = {6, 5}, .channels = 16, .rows = 18, .groups = 3});
  half("groups of whole 16-row tiles", {.image = {6, 5}, .channels = 16, .rows = 32, .groups = 2});
  half("groups, nine rows of token tiles", {.image = {25, 24}, .channels = 4, .rows = 4, .groups = 3});
  half("groups of more than a tile", {.image = {5, 5}, .channels = 8, .rows = 70, .groups = 2});
  half("groups of 12 channels", {.image = {6, 5}, .channels = 12, .rows = 5, .groups = 3});
  half("pointwise groups", {.image = {6, 5}, .channels = 16, .rows = 8, .kernel = {1, 1}, .pad = {0, 0}, .groups = 2});
  half("groups, large, split", {.image = {12, 11}, .channels = 16, .rows = 130, .groups = 2},
       {.tile = kLarge, .splits = 2});

  for (int splits : {2, 3, 5})
    tests.run("f16 splits=%d", splits,
              [=] { convolve<__half, __half>({.image = {7, 9}, .channels = 40, .rows = 66}, {.splits = splits}); });
  half("splits that begin within a tap", {.image = {4, 5}, .channels = 72, .rows = 17}, {.splits = 5});
  half("splits, 12 channels", {.image = {4, 5}, .channels = 12, .rows = 17, .kernel = {5, 5}, .pad = {2, 2}},
       {.splits = 3});

  tests.run("bf16 large, f32 output, residual, relu", [=] {
    convolve<__nv_bfloat16, float>({.batch = 2, .image = {9, 8}, .channels = 24, .rows = 129},
                                   {.tile = kLarge, .activation = Activation::relu, .residual = true});
  });
  half("no bias", {.image = {4, 5}, .channels = 8}, {.bias = false});
  half("residual", {.image = {4, 5}, .channels = 8, .rows = 7}, {.residual = true});
  half("no images", {.batch = 0, .channels = 8});
  return tests.result();
}
