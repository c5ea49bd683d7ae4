// kernels: nm24_linear nm24_linear_sm90_f16 nm24_linear_sm90_bf16 nm24_linear_sm90_e4m3 nm24_linear_sm90_i8
// nm24_linear's tile kernels, through their host code, against float64.
#include "linear_case.h"

using namespace sparseops;

// Of 8-bit metadata two lanes read the same slot, while a load of 16 bytes takes a pass for every eight lanes.
const std::vector<emu::Exception> kSharedSlots = {{"read (mainloop.cuh", "two lanes read one slot"}};

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  const TileShape kSmall = TileShape::small, kLarge = TileShape::large;

  // One whole tile: every line moves as few lines of memory as its bytes need.
  for (TileShape tile : {kSmall, kLarge}) {
    const int size = tile == kSmall ? 64 : 128;
    tests.run("f16 one whole tile of %d", size, [=] {
      linear<__half, __half>({size, size, 256}, {.tile = tile, .residual = true});
      emu::expect_ideal_traffic({});
    });
    tests.run("f16 two splits of a tile of %d", size, [=] {
      linear<__half, __half>({size, size, 256}, {.tile = tile, .splits = 2});
      emu::expect_ideal_traffic({});
    });
    tests.run("i8 one whole tile of %d", size, [=] {
      linear<int8_t, __half>({size, size, 256}, {.tile = tile, .scales = true});
      emu::expect_ideal_traffic(kSharedSlots);
    });
    tests.run("f32 output, one whole tile of %d", size, [=] {
      linear<__nv_bfloat16, float>({size, size, 128}, {.tile = tile});
      emu::expect_ideal_traffic({});
    });
  }

  // Around every number the code divides by: 4 features to a thread's store, 8 columns of a copy, 16 rows of a tile of
  // metadata, 32 columns of a row of the weight, 64 and 128 of a step and a slab, tiles of 64 and 128.
  for (int rows : {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129})
    tests.run("f16 rows=%d", rows, [=] { linear<__half, __half>({rows, 9, 64}, {}); });
  for (int tokens : {1, 2, 7, 8, 9, 31, 33, 63, 64, 65, 127, 129})
    tests.run("f16 tokens=%d", tokens, [=] { linear<__half, __half>({20, tokens, 64}, {}); });
  for (int columns : {8, 16, 24, 32, 40, 56, 64, 72, 120, 128, 136, 184, 192, 200, 256, 264, 320, 448, 520})
    tests.run("f16 in_features=%d", columns, [=] { linear<__half, __half>({18, 10, columns}, {}); });
  for (int columns : {16, 32, 48, 64, 112, 128, 144, 256, 272, 640})
    tests.run("i8 in_features=%d", columns, [=] { linear<int8_t, float>({18, 10, columns}, {.scales = true}); });
  for (int columns : {64, 128, 192, 320, 448})
    tests.run("f16 large, in_features=%d", columns,
              [=] { linear<__half, __half>({140, 130, columns}, {.tile = kLarge}); });
  tests.run("i8 large", [=] { linear<int8_t, __nv_bfloat16>({140, 130, 400}, {.tile = kLarge, .scales = true}); });
  tests.run("bf16 large", [=] { linear<__nv_bfloat16, __nv_bfloat16>({129, 127, 200}, {.tile = kLarge}); });
  tests.run("bf16 small", [=] { linear<__nv_bfloat16, __nv_bfloat16>({66, 63, 96}, {}); });

  // Nine rows of token tiles: more than are gone through together.
  tests.run("f16 nine by two tiles", [=] { linear<__half, __half>({65, 65 * 9 - 64, 32}, {}); });
  tests.run("f16 sixteen by three tiles", [=] { linear<__half, __half>({129, 64 * 16, 32}, {}); });

  for (int splits : {2, 3, 4, 7}) {
    tests.run("f16 splits=%d", splits, [=] { linear<__half, __half>({70, 66, 392}, {.splits = splits}); });
    tests.run("i8 splits=%d", splits,
              [=] { linear<int8_t, float>({70, 66, 400}, {.splits = splits, .scales = true}); });
  }
  tests.run("f16 large, splits=3", [=] { linear<__half, float>({130, 20, 520}, {.tile = kLarge, .splits = 3}); });
  tests.run("f16 more splits than slabs",
            [=] { linear<__half, __half>({16, 8, 64}, {.splits = 3, .activation = Activation::gelu}); });

  for (Activation activation : {Activation::none, Activation::relu, Activation::silu, Activation::gelu}) {
    tests.run("f16 activation=%d", static_cast<int>(activation),
              [=] { linear<__half, __half>({19, 12, 40}, {.activation = activation}); });
    tests.run("bf16 activation=%d with residual", static_cast<int>(activation), [=] {
      linear<__nv_bfloat16, float>({20, 12, 40}, {.activation = activation, .bias = false, .residual = true});
    });
  }
  tests.run("f16 no bias", [=] { linear<__half, __half>({19, 12, 40}, {.bias = false}); });
  tests.run("f16 odd rows with residual", [=] { linear<__half, __half>({21, 12, 40}, {.residual = true}); });
  for (int offset : {1, 2, 4})
    tests.run("f16 bias that begins %d elements late", offset,
              [=] { linear<__half, __half>({24, 9, 40}, {.misaligned_bias = offset}); });
  for (int rows : {16, 48, 100})
    tests.run("f16 slabs of %d rows", rows,
              [=] { linear<__half, __half>({rows, 9, 136}, {.tile = kLarge, .tight_slabs = true}); });
  tests.run("i8 slabs of 20 rows", [=] { linear<int8_t, float>({20, 9, 144}, {.tight_slabs = true}); });
  tests.run("f16 rows of x lie apart", [=] { linear<__half, __half>({24, 9, 40}, {.gap = 24}); });
  tests.run("f16 no tokens", [=] { linear<__half, __half>({24, 0, 40}, {}); });
  tests.run("f16 no columns", [=] { linear<__half, __half>({24, 9, 0}, {}); });
  return tests.result();
}
