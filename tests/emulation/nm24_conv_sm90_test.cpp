// kernels: nm24_conv nm24_conv_sm90 nm24_linear nm24_linear_sm90_f16 nm24_linear_sm90_bf16 nm24_linear_sm90_e4m3 nm24_linear_sm90_i8
// nm24_conv's kernels for sm_90a, through their host code, against float64.
#include "conv_case.h"

using namespace sparseops;

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  const TileShape k64 = TileShape::sm90_128x64, k3 = TileShape::sm90_192x192;
  const auto half = [&](const char* name, const Shape& shape, Options options = {}) {
    options.tile = k64;
    tests.run(std::string("f16 ") + name, [=] { convolve<__half, __half>(shape, options); });
  };

  const std::pair<TileShape, const char*> kTiles[] = {{TileShape::sm90_128x64, "128x64"},
                                                      {TileShape::sm90_128x128, "128x128"},
                                                      {TileShape::sm90_128x256, "128x256"},
                                                      {TileShape::sm90_256x128, "256x128"},
                                                      {TileShape::sm90_192x192, "192x192"}};
  for (const auto& [tile, name] : kTiles) {
    tests.run(std::string("f16 tile ") + name, [tile = tile] {
      convolve<__half, __half>({.batch = 3, .image = {9, 11}, .channels = 64, .rows = 200},
                               {.tile = tile, .residual = true});
    });
    tests.run(std::string("bf16 cluster, tile ") + name, [tile = tile] {
      convolve<__nv_bfloat16, __nv_bfloat16>(
          {.batch = 2, .image = {13, 8}, .channels = 64, .rows = 264, .stride = {2, 1}},
          {.tile = tile, .activation = Activation::relu, .cluster = 2, .blocks = 4});
    });
  }
  tests.run("f16 whole tiles", [=] {
    convolve<__half, __half>({.image = {8, 8}, .channels = 64, .rows = 128}, {.tile = k64});
    emu::expect_ideal_traffic({{"read_shared (mainloop_sm90.cuh", "slots of metadata lie as a bulk copy brings them"}});
  });

  // An odd number of atoms leaves half a stage; taps of one to three atoms.
  for (int channels : {64, 128, 192}) {
    for (Pair kernel : {Pair{1, 3}, Pair{2, 2}, Pair{3, 3}}) {
      const Shape shape{.image = {5, 6}, .channels = channels, .rows = 16, .kernel = kernel};
      tests.run("f16 channels=%d, kernel %dx%d", channels, kernel.h, kernel.w,
                [=] { convolve<__half, __half>(shape, {.tile = k64, .blocks = 1}); });
    }
  }
  for (int width : {1, 2, 7, 31, 32, 33, 65})
    tests.run("f16 width=%d", width, [=] {
      convolve<__half, __half>({.batch = 2, .image = {2, width}, .channels = 64, .rows = 8},
                               {.tile = k64, .residual = true, .cluster = 2});
    });
  for (int height : {1, 3, 8})
    tests.run("f16 height=%d", height, [=] {
      convolve<__half, __half>({.batch = 3, .image = {height, 5}, .channels = 64, .rows = 8}, {.tile = k64});
    });
  tests.run("f16 many small images", [=] {
    convolve<__half, __half>({.batch = 41, .image = {2, 3}, .channels = 64, .rows = 8},
                             {.tile = k3, .cluster = 2, .blocks = 2});
  });

  half("stride", {.image = {11, 10}, .channels = 64, .stride = {2, 3}, .pad = {0, 2}});
  half("dilation", {.image = {11, 12}, .channels = 64, .pad = {2, 3}, .dilation = {2, 3}});
  half("stride and dilation",
       {.batch = 2, .image = {13, 12}, .channels = 64, .rows = 40, .stride = {3, 2}, .dilation = {3, 2}});
  half("more padding at the end",
       {.image = {5, 6}, .channels = 64, .kernel = {2, 4}, .pad = {0, 1}, .more_padding = 1});
  half("padding wider than the image", {.image = {3, 2}, .channels = 64, .rows = 8, .pad = {9, 11}});
  half("kernel is image", {.batch = 2, .image = {4, 5}, .channels = 64, .rows = 8, .kernel = {4, 5}, .pad = {0, 0}});
  half("stride that leaves rows over", {.image = {10, 9}, .channels = 64, .stride = {4, 4}, .pad = {0, 0}});
  half("pointwise", {.batch = 2, .image = {5, 7}, .channels = 64, .rows = 24, .kernel = {1, 1}, .pad = {0, 0}});
  half("pointwise, stride 2", {.image = {5, 7}, .channels = 64, .kernel = {1, 1}, .stride = {2, 2}, .pad = {0, 0}});
  half("pointwise, padded", {.image = {5, 7}, .channels = 64, .kernel = {1, 1}});
  for (int splits : {2, 3, 5})
    tests.run("f16 splits=%d", splits, [=] {
      convolve<__half, __half>({.image = {7, 9}, .channels = 64, .rows = 136},
                               {.tile = k64, .splits = splits, .cluster = 2, .blocks = 4});
    });
  half("a split that begins at the 72nd tap",
       {.image = {9, 9}, .channels = 64, .rows = 8, .kernel = {9, 9}, .pad = {4, 4}}, {.splits = 5});
  // Half a stage lies past the last tap; there a fourth row of taps would reach the NaN from the row of pixels above.
  half("a pixel that is no number", {.image = {6, 5}, .channels = 64}, {.nan_pixel = 3 * 5 + 2});
  tests.run("bf16 to f32, residual, silu", [=] {
    convolve<__nv_bfloat16, float>({.batch = 2, .image = {9, 8}, .channels = 64, .rows = 132},
                                   {.tile = k64, .residual = true});
  });
  half("no bias", {.image = {4, 5}, .channels = 64}, {.bias = false});
  half("no images", {.batch = 0, .channels = 64});

  const auto refuses = [&](const char* name, const char* part, const Shape& shape) {
    tests.run(std::string("refuses ") + name,
              [=] { emu::expect_error(part, [&] { convolve<__half, __half>(shape, {.tile = k64}); }); });
  };
  refuses("96 channels", "multiple of 64", {.image = {4, 4}, .channels = 96});
  refuses("groups", "one group", {.image = {4, 4}, .channels = 64, .rows = 16, .groups = 2});
  refuses("a stride of 9", "strides up to 8", {.image = {12, 12}, .channels = 64, .stride = {9, 1}});
  refuses("a padding of 129", "padding up to 128", {.image = {2, 2}, .channels = 64, .rows = 8, .pad = {129, 0}});
  return tests.result();
}
