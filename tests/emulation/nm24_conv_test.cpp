// kernels: nm24_conv nm24_conv_sm90 nm24_linear nm24_linear_sm90_f16 nm24_linear_sm90_bf16 nm24_linear_sm90_e4m3 nm24_linear_sm90_i8
// nm24_conv through its host code, against float64.
#include "conv_case.h"

using namespace sparseops;

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
