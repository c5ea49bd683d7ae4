// archs: 80+
// Host side of nm24_linear.cuh and nm24_few_tokens.cuh: checks what the kernels assume, makes the device current,
// launches.
#include "cuda/nm24_linear.cuh"

#include <climits>
#include <iterator>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/nm24_few_tokens.cuh"
#include "cuda/sm90.h"
#include "ops.h"

namespace sparseops {
namespace {

template <class Tile>
constexpr CudaTile describe(const char* name) {
  return {name, Tile::kFeatures, Tile::kTokens, Tile::kColumns, 1, 80};
}

constexpr CudaTile kTiles[] = {
    {"few8", NM24FewTokens<__half, 8>::kFeatures, 8, 128, 1, 80},
    {"few16", NM24FewTokens<__half, 16>::kFeatures, 16, 128, 1, 80},
    describe<SmallTile<__half>>("small"),
    describe<LargeTile<__half>>("large"),
    {"sm90_128x8", 128, 8, 128, 2, 90},
    {"sm90_128x16", 128, 16, 128, 2, 90},
    {"sm90_128x32", 128, 32, 128, 2, 90},
    {"sm90_128x64", 128, 64, 128, 2, 90},
    {"sm90_128x128", 128, 128, 128, 2, 90},
    {"sm90_128x256", 128, 256, 128, 2, 90},
    {"sm90_256x128", 256, 128, 128, 2, 90},
    {"sm90_192x192", 192, 192, 128, 3, 90},
    {"sm90_rs_128x256", 128, 256, 128, 2, 90},
    {"sm90_rs_256x128", 256, 128, 128, 2, 90},
};

const char* refuse(const CudaNM24Linear& op, const CudaPlan& plan) {
  const bool bytes = op.dtype == DType::i8 || op.dtype == DType::e4m3;
  const int64_t element = bytes ? 1 : 2;
  if (op.dtype == DType::f32) return "nm24_linear: dtype must be f16, bf16, i8 or e4m3 on a GPU";
  if (op.dtype == DType::e4m3 && !is_sm90(plan.tile)) return "nm24_linear: e4m3 needs a tile of sm90";
  if (!bytes && op.epilogue.dtype != op.dtype && op.epilogue.dtype != DType::f32)
    return "nm24_linear: y must have the dtype of x, or f32";
  if (op.weight.rows < 0 || op.weight.cols < 0 || op.weight.cols % 32 != 0 || op.weight.slab_rows < op.weight.rows)
    return "nm24_linear: cols must be a multiple of 32, and slabs must hold all rows";
  if (op.in_features * element % 16 != 0 || op.x_stride * element % 16 != 0)
    return "nm24_linear: rows of x must be, and lie apart by, multiples of 16 bytes";
  for (const void* pointer : {op.x, op.weight.values, op.weight.slabs, static_cast<const void*>(op.y)})
    if (!aligned(pointer, 16)) return "nm24_linear: x, values, slabs and y must begin at multiples of 16 bytes";
  if (plan.splits < 1 || (plan.splits > 1 && !(plan.partials && plan.counters)))
    return "nm24_linear: splits must be at least 1, and more than 1 need partials and counters";
  if (bytes && (plan.tile == TileShape::few8 || plan.tile == TileShape::few16))
    return "nm24_linear: tile must not be one for few tokens for 8-bit elements";
  const CudaTile& tile = kTiles[static_cast<int>(plan.tile)];
  if (ceil_div(op.weight.rows, tile.features) * ceil_div(op.tokens, tile.tokens) > INT_MAX || plan.splits > 65535)
    return "nm24_linear: the output must have fewer than 2^31 tiles";
  return nullptr;
}

// Config says how the kernel wants to be launched.
template <class Config>
const char* launch_nm24_linear(void (*kernel)(CudaNM24Linear, CudaPlan), const CudaNM24Linear& op,
                               const CudaPlan& plan) {
  const int64_t tiles = ceil_div(op.weight.rows, Config::kFeatures) * ceil_div(op.tokens, Config::kTokens);
  const dim3 grid(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(plan.splits));
  return cuda_error_text(
      launch(kernel, grid, Config::kThreads, Config::kSharedBytes, static_cast<cudaStream_t>(plan.stream), op, plan));
}

template <class element_t>
const char* launch_tile(const CudaNM24Linear& op, const CudaPlan& plan) {
  if (plan.tile == TileShape::large)
    return launch_nm24_linear<LargeTile<element_t>>(nm24_linear_kernel<LargeTile<element_t>>, op, plan);
  return launch_nm24_linear<SmallTile<element_t>>(nm24_linear_kernel<SmallTile<element_t>>, op, plan);
}

template <class element_t>
const char* launch_any(const CudaNM24Linear& op, const CudaPlan& plan) {
  switch (plan.tile) {
    case TileShape::few8:
      return launch_nm24_linear<NM24FewTokens<element_t, 8>>(nm24_few_tokens_kernel<element_t, 8>, op, plan);
    case TileShape::few16:
      return launch_nm24_linear<NM24FewTokens<element_t, 16>>(nm24_few_tokens_kernel<element_t, 16>, op, plan);
    default:
      return launch_tile<element_t>(op, plan);
  }
}

}  // namespace

const CudaTile* cuda_tiles(int* count) {
  *count = static_cast<int>(std::size(kTiles));
  return kTiles;
}

const char* cuda_nm24_linear(const CudaNM24Linear& op, const CudaPlan& plan) {
  if (const char* refused = refuse(op, plan)) return refused;
  if (op.weight.rows == 0 || op.tokens == 0) return nullptr;

  const DeviceGuard guard(plan.device);
  if (const char* error = cuda_error_text(guard.error())) return error;
  const bool sm90 = is_sm90(plan.tile);
  switch (op.dtype) {
    case DType::f16:
      return sm90 ? nm24_linear_sm90_f16(op, plan) : launch_any<__half>(op, plan);
    case DType::bf16:
      return sm90 ? nm24_linear_sm90_bf16(op, plan) : launch_any<__nv_bfloat16>(op, plan);
    case DType::e4m3:
      return nm24_linear_sm90_e4m3(op, plan);
    default:
      return sm90 ? nm24_linear_sm90_i8(op, plan) : launch_tile<int8_t>(op, plan);
  }
}

}  // namespace sparseops
