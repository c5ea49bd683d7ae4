// archs: 80+
// Host side of nm24_conv.cuh: checks what the kernel assumes, makes the device current, launches. A convolution that is
// a matrix product already goes to nm24_linear.
#include "cuda/nm24_conv.cuh"

#include <climits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm90.h"
#include "ops.h"

namespace sparseops {
namespace {

const char* refuse(const CudaNM24Conv& op, const CudaPlan& plan) {
  if (op.dtype != DType::f16 && op.dtype != DType::bf16) return "nm24_conv: dtype must be f16 or bf16 on a GPU";
  if (op.epilogue.dtype != op.dtype && op.epilogue.dtype != DType::f32)
    return "nm24_conv: y must have the dtype of x, or f32";
  if (op.groups < 1 || op.channels % (4 * op.groups) != 0 || op.weight.rows % op.groups != 0)
    return "nm24_conv: channels of a group must be a multiple of 4, and groups must divide the rows";
  if (op.weight.cols % 32 != 0 || op.weight.cols < op.kernel_h * op.kernel_w * (op.channels / op.groups))
    return "nm24_conv: cols must be a multiple of 32 and hold every tap";
  if (op.weight.slab_rows < ceil_div(op.weight.rows / op.groups, 16) * 16 * op.groups)
    return "nm24_conv: slabs must hold the rows of each group, rounded up to 16";
  for (const void* pointer : {op.x, op.weight.values, op.weight.slabs, static_cast<const void*>(op.y)})
    if (!aligned(pointer, 16)) return "nm24_conv: x, values, slabs and y must begin at multiples of 16 bytes";
  if (plan.splits < 1 || plan.splits > 65535 || (plan.splits > 1 && !(plan.partials && plan.counters)))
    return "nm24_conv: splits must be at least 1, and more than 1 need partials and counters";
  if (plan.tile == TileShape::few8 || plan.tile == TileShape::few16)
    return "nm24_conv: tile must not be one for few tokens";
  if (op.channels / op.groups % 8 != 0 && plan.tile != TileShape::small)
    return "nm24_conv: tile must be small where the channels of a group are no multiple of 8";
  // The kernel counts pixels in 32 bits, and tiles, of which there are fewer.
  constexpr int64_t kMost = INT_MAX - 128;
  if (op.batch * op.height * op.width > kMost || op.batch * op.out_height * op.out_width * op.groups > kMost)
    return "nm24_conv: x and y must have fewer than 2^31 pixels";
  return nullptr;
}

bool is_matrix_product(const CudaNM24Conv& op) {
  return op.kernel_h == 1 && op.kernel_w == 1 && op.stride_h == 1 && op.stride_w == 1 && op.out_height == op.height &&
         op.out_width == op.width && op.groups == 1 && op.channels % 8 == 0;
}

template <class Tile, int kCopyBytes>
const char* launch_nm24_conv(const CudaNM24Conv& op, const CudaPlan& plan) {
  const int64_t tokens = op.batch * op.out_height * op.out_width;
  const int64_t tiles =
      ceil_div(op.weight.rows / op.groups, Tile::kFeatures) * op.groups * ceil_div(tokens, Tile::kTokens);
  const dim3 grid(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(plan.splits));
  return cuda_error_text(launch(nm24_conv_kernel<Tile, kCopyBytes>, grid, Tile::kThreads, Tile::kSharedBytes,
                                static_cast<cudaStream_t>(plan.stream), op, plan));
}

template <class element_t>
const char* launch_tile(const CudaNM24Conv& op, const CudaPlan& plan) {
  if (plan.tile == TileShape::large) return launch_nm24_conv<LargeTile<element_t>, 16>(op, plan);
  if (op.channels / op.groups % 8 == 0) return launch_nm24_conv<SmallTile<element_t>, 16>(op, plan);
  return launch_nm24_conv<SmallTile<element_t>, 8>(op, plan);
}

}  // namespace

const char* cuda_nm24_conv(const CudaNM24Conv& op, const CudaPlan& plan) {
  if (const char* refused = refuse(op, plan)) return refused;
  if (op.weight.rows == 0 || op.batch == 0) return nullptr;
  if (is_matrix_product(op)) {
    const int64_t pixels = op.batch * op.height * op.width;
    return cuda_nm24_linear({op.x, op.channels, op.weight, op.epilogue, op.y, pixels, op.channels, op.dtype}, plan);
  }

  const DeviceGuard guard(plan.device);
  if (const char* error = cuda_error_text(guard.error())) return error;
  if (is_sm90(plan.tile)) return nm24_conv_sm90(op, plan);
  return op.dtype == DType::f16 ? launch_tile<__half>(op, plan) : launch_tile<__nv_bfloat16>(op, plan);
}

}  // namespace sparseops
