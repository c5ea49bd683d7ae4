// archs: 90a
// Host side of nm24_conv_sm90.cuh: checks what the kernel assumes, describes the tensors, launches.
#include "cuda/nm24_conv_sm90.cuh"

#include "cuda/launch_sm90.cuh"
#include "cuda/sm90.h"

namespace sparseops {
namespace {

const char* refuse(const CudaNM24Conv& op) {
  if (op.groups != 1 || op.channels % 64 != 0)
    return "nm24_conv: tiles of sm90 need one group, and channels that are a multiple of 64";
  if (op.weight.cols != op.kernel_h * op.kernel_w * op.channels) return "nm24_conv: cols must be those of the taps";
  // What the copy engine's description of an image holds: corners in 8 bits, and offsets of taps.
  const auto fits = [](int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t out, int64_t size) {
    const int64_t end = (out - 1) * stride - pad - (size - 1);
    return stride <= 8 && pad <= 128 && end >= -128 && end <= 127 && (kernel - 1) * dilation <= 254;
  };
  if (!fits(op.kernel_h, op.stride_h, op.pad_top, op.dilation_h, op.out_height, op.height) ||
      !fits(op.kernel_w, op.stride_w, op.pad_left, op.dilation_w, op.out_width, op.width))
    return "nm24_conv: tiles of sm90 need strides up to 8, padding up to 128 and a dilated kernel up to 255";
  return nullptr;
}

template <class Tile>
const char* launch_conv_tile(const CudaNM24Conv& op, const CudaPlan& plan) {
  const int64_t tokens = op.batch * op.out_height * op.out_width;
  if (const char* refused = refuse_sm90<Tile>(op.weight, op.epilogue, plan, tokens)) return refused;
  Sm90Product product{};
  if (const char* error = describe_product<Tile>(&product, op.weight, op.epilogue, plan, op.dtype, op.y, tokens))
    return error;
  Sm90Pixels x;
  if (const char* error = encode_pixels(&x.map, op, Tile::kTokens / plan.cluster)) return error;
  const auto narrow = [](int64_t size) { return static_cast<int>(size); };
  x.channels = narrow(op.channels);
  x.kernel_w = narrow(op.kernel_w), x.kernel_h = narrow(op.kernel_h);
  x.out_width = narrow(op.out_width), x.out_height = narrow(op.out_height);
  x.stride_w = narrow(op.stride_w), x.stride_h = narrow(op.stride_h);
  x.pad_left = narrow(op.pad_left), x.pad_top = narrow(op.pad_top);
  x.dilation_w = narrow(op.dilation_w), x.dilation_h = narrow(op.dilation_h);
  return launch_sm90<Tile>(nm24_conv_sm90_kernel<Tile>, product, x);
}

template <class element_t>
const char* launch_conv_sm90(const CudaNM24Conv& op, const CudaPlan& plan) {
  return with_sm90_tile<element_t>(plan.tile, [&](auto tile) { return launch_conv_tile<decltype(tile)>(op, plan); });
}

}  // namespace

const char* nm24_conv_sm90(const CudaNM24Conv& op, const CudaPlan& plan) {
  if (const char* refused = refuse(op)) return refused;
  return op.dtype == DType::f16 ? launch_conv_sm90<__half>(op, plan) : launch_conv_sm90<__nv_bfloat16>(op, plan);
}

}  // namespace sparseops
