// kernels: nm24_linear nm24_linear_sm90_f16 nm24_linear_sm90_bf16 nm24_linear_sm90_e4m3 nm24_linear_sm90_i8
// nm24_linear's kernels for sm_90a, through their host code, against float64.
#include "linear_case.h"

using namespace sparseops;

namespace {

// Lines that take more passes over the banks than their bytes need.
const std::vector<emu::Exception> kExceptions = {
    {"read_shared (mainloop_sm90.cuh", "slots of metadata lie as a bulk copy brings them; once in 1000 clocks or so"},
};

struct Case {
  TileShape shape;
  const char* name;
  int features, tokens;
};

constexpr Case kTiles[] = {
    {TileShape::sm90_128x8, "128x8", 128, 8},
    {TileShape::sm90_128x16, "128x16", 128, 16},
    {TileShape::sm90_128x32, "128x32", 128, 32},
    {TileShape::sm90_128x64, "128x64", 128, 64},
    {TileShape::sm90_128x128, "128x128", 128, 128},
    {TileShape::sm90_128x256, "128x256", 128, 256},
    {TileShape::sm90_256x128, "256x128", 256, 128},
    {TileShape::sm90_192x192, "192x192", 192, 192},
    {TileShape::sm90_rs_128x256, "rs 128x256", 128, 256},
    {TileShape::sm90_rs_256x128, "rs 256x128", 256, 128},
};

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  const TileShape k64 = TileShape::sm90_128x64, k256 = TileShape::sm90_128x256, k3 = TileShape::sm90_192x192;
  const TileShape kTall = TileShape::sm90_256x128, kRs = TileShape::sm90_rs_128x256;

  for (const Case& tile : kTiles) {
    const std::string name = tile.name;
    tests.run("f16 one whole tile of " + name, [=] {
      linear<__half, __half>({tile.features, tile.tokens, 256}, {.tile = tile.shape});
      emu::expect_ideal_traffic(kExceptions);
    });
    // one row of 8 features and a token more or less than a tile; a block that takes several tiles
    tests.run("bf16 over the edge of " + name, [=] {
      linear<__nv_bfloat16, __nv_bfloat16>({tile.features + 8, tile.tokens + 1, 136},
                                           {.tile = tile.shape, .residual = true, .blocks = 1});
    });
    tests.run("f16 short of the edge of " + name, [=] {
      linear<__half, float>({tile.features - 8, tile.tokens - 1, 72},
                            {.tile = tile.shape, .activation = Activation::relu, .residual = true});
    });
    tests.run("f16 two splits of " + name, [=] {
      linear<__half, __half>({tile.features, tile.tokens, 392},
                             {.tile = tile.shape, .splits = 2, .residual = true, .blocks = 2});
    });
    if (tile.tokens < 64) continue;
    tests.run("f16 cluster, " + name, [=] {
      linear<__half, __half>({2 * tile.features, tile.tokens + 3, 400}, {.tile = tile.shape, .cluster = 2});
    });
  }

  for (const Case& tile : kTiles) {
    if (tile.tokens < 64 || tile.shape >= TileShape::sm90_rs_128x256) continue;
    const std::string name = tile.name;
    tests.run("i8 " + name, [=] {
      linear<int8_t, __half>({tile.features + 16, tile.tokens + 2, 400}, {.tile = tile.shape, .scales = true});
    });
    tests.run("e4m3 " + name, [=] {
      linear<__nv_fp8_e4m3, __nv_bfloat16>({tile.features + 16, tile.tokens + 2, 400},
                                           {.tile = tile.shape, .scales = true, .cluster = 2});
    });
  }
  for (int columns : {16, 32, 128, 144, 256, 272, 384, 640, 1040})
    tests.run("i8 in_features=%d", columns,
              [=] { linear<int8_t, float>({24, 10, columns}, {.tile = k64, .scales = true, .blocks = 1}); });
  tests.run("i8 to bf16, splits", [=] {
    linear<int8_t, __nv_bfloat16>({136, 10, 1296}, {.tile = k64, .splits = 3, .residual = true, .scales = true});
  });

  // Around the numbers that the code divides by: 128 columns of a stage, 64 of an atom, 32 of a row of the weight, and
  // the slots of both rings.
  for (int columns : {8, 24, 32, 40, 64, 72, 96, 104, 128, 136, 192, 200, 256, 320, 384, 512, 520, 648})
    tests.run("f16 in_features=%d", columns,
              [=] { linear<__half, __half>({40, 9, columns}, {.tile = k64, .blocks = 1}); });
  for (int columns : {64, 128, 192, 256, 448, 648}) {
    tests.run("f16 192x192, in_features=%d", columns,
              [=] { linear<__half, __half>({200, 100, columns}, {.tile = k3, .blocks = 1}); });
    tests.run("f16 rs, in_features=%d", columns,
              [=] { linear<__half, __half>({136, 100, columns}, {.tile = kRs, .blocks = 1}); });
  }
  // 8 rows of a 16-byte store, 16 of a tile of metadata, 64 of a consumer
  for (int rows : {8, 16, 24, 56, 64, 72, 120, 136, 192, 248, 264})
    tests.run("f16 rows=%d", rows, [=] {
      linear<__half, __half>({rows, 5, 200}, {.tile = k64, .residual = true, .cluster = 2, .blocks = 4});
    });
  for (int rows : {4, 12, 20, 68})
    tests.run("f32 rows=%d", rows,
              [=] { linear<__nv_bfloat16, float>({rows, 19, 72}, {.tile = k64, .residual = true}); });
  for (int tokens : {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 200})
    tests.run("f16 tokens=%d", tokens,
              [=] { linear<__half, __half>({24, tokens, 72}, {.tile = k64, .residual = true, .blocks = 3}); });
  for (int tokens : {95, 96, 97, 191, 193})
    tests.run("f16 192x192, tokens=%d", tokens,
              [=] { linear<__half, __half>({24, tokens, 72}, {.tile = k3, .residual = true, .cluster = 2}); });

  // Nine rows of token tiles: more than are gone through together.
  tests.run("f16 nine by three tiles",
            [=] { linear<__half, __half>({264, 64 * 9 - 63, 40}, {.tile = k64, .cluster = 2, .blocks = 4}); });
  tests.run("f16 three feature tiles in clusters",
            [=] { linear<__half, __half>({3 * 128, 70, 136}, {.tile = k64, .residual = true, .cluster = 2}); });
  tests.run("f16 three tall feature tiles in clusters, splits", [=] {
    linear<__half, float>({3 * 256, 130, 520}, {.tile = kTall, .splits = 2, .cluster = 2, .blocks = 6});
  });
  for (int splits : {2, 3, 5})
    tests.run("f16 splits=%d", splits, [=] {
      linear<__half, __half>({136, 66, 640}, {.tile = k64, .splits = splits, .cluster = 2, .blocks = 4});
    });

  for (Activation activation : {Activation::none, Activation::relu, Activation::silu, Activation::gelu}) {
    tests.run("f16 activation=%d", static_cast<int>(activation),
              [=] { linear<__half, __half>({40, 12, 40}, {.tile = k64, .activation = activation}); });
    tests.run("bf16 to f32, activation=%d", static_cast<int>(activation), [=] {
      linear<__nv_bfloat16, float>({40, 40, 40},
                                   {.tile = k256, .activation = activation, .bias = false, .residual = true});
    });
  }
  tests.run("f16 no bias", [=] { linear<__half, __half>({40, 12, 40}, {.tile = k64, .bias = false}); });
  for (int rows : {16, 48, 112, 208})
    tests.run("f16 slabs of %d rows", rows,
              [=] { linear<__half, __half>({rows, 9, 136}, {.tile = k64, .tight_slabs = true, .cluster = 2}); });
  for (int rows : {16, 144, 272})
    tests.run("f16 rs, slabs of %d rows", rows, [=] {
      linear<__half, __half>({rows, 9, 136}, {.tile = TileShape::sm90_rs_256x128, .tight_slabs = true, .cluster = 2});
    });
  tests.run("f16 rows of x lie apart", [=] { linear<__half, __half>({24, 9, 40}, {.tile = k64, .gap = 24}); });

  const auto refuses = [&](const char* name, const char* part, const Shape& shape, const Options& options) {
    tests.run(std::string("refuses ") + name,
              [=] { emu::expect_error(part, [&] { linear<__half, __half>(shape, options); }); });
  };
  refuses("rows of 12", "whole 16 bytes", {12, 9, 40}, {.tile = k64});
  refuses("no columns", "need columns", {16, 9, 0}, {.tile = k64});
  refuses("scales", "8-bit elements alone", {16, 9, 40}, {.tile = k64, .scales = true});
  refuses("a cluster of few tokens", "cluster must be", {16, 9, 40}, {.tile = TileShape::sm90_128x32, .cluster = 2});
  refuses("an idle split", "without a stage", {16, 9, 512}, {.tile = k64, .splits = 3});
  tests.run("f16 no tokens", [=] { linear<__half, __half>({24, 0, 40}, {.tile = k64}); });
  return tests.result();
}
