// archs: 80+
// Host side of nm24_grad_values.cuh: checks what the kernel assumes, makes the device current, chooses the tile,
// launches.
#include "cuda/nm24_grad_values.cuh"

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "ops.h"

namespace sparseops {
namespace {

const char* refuse(const CudaNM24GradValues& op) {
  if (op.dtype != DType::f16 && op.dtype != DType::bf16) return "nm24_grad_values: dtype must be f16 or bf16 on a GPU";
  if (op.rows < 0 || op.cols < 0 || op.cols % 32 != 0 || op.tokens < 0 || op.in_features > op.cols)
    return "nm24_grad_values: cols must be a multiple of 32 that holds in_features, rows and tokens not negative";
  if (op.grad_stride % 8 != 0 || op.x_stride % 8 != 0)
    return "nm24_grad_values: rows of grad and x must lie apart by multiples of 16 bytes";
  if (!aligned(op.grad, 16) || !aligned(op.x, 16))
    return "nm24_grad_values: grad and x must begin at multiples of 16 bytes";
  if (!aligned(op.grad_values, 4)) return "nm24_grad_values: grad_values must begin at a multiple of 4 bytes";
  if (ceil_div(op.cols, 64) > 65535) return "nm24_grad_values: cols must be below 2^22";
  return nullptr;
}

template <class Tile>
dim3 grid_of(const CudaNM24GradValues& op) {
  return dim3(static_cast<unsigned>(ceil_div(op.rows, Tile::kFeatures)),
              static_cast<unsigned>(ceil_div(op.cols, Tile::kColumns)));
}

template <class Tile>
const char* launch_tile(const CudaNM24GradValues& op, cudaStream_t stream) {
  return cuda_error_text(
      launch(nm24_grad_values_kernel<Tile>, grid_of<Tile>(op), dim3(Tile::kThreads), Tile::kSharedBytes, stream, op));
}

// The large tile reads half as much for each of its sums; the small one makes four times as many blocks.
template <class element_t>
const char* launch_nm24_grad_values(const CudaNM24GradValues& op, int multiprocessors, cudaStream_t stream) {
  const dim3 large = grid_of<LargeGradTile<element_t>>(op);
  if (int64_t(large.x) * large.y >= multiprocessors) return launch_tile<LargeGradTile<element_t>>(op, stream);
  return launch_tile<SmallGradTile<element_t>>(op, stream);
}

}  // namespace

const char* cuda_nm24_grad_values(const CudaNM24GradValues& op, int device, void* stream) {
  if (const char* refused = refuse(op)) return refused;
  if (op.rows == 0 || op.cols == 0) return nullptr;

  const DeviceGuard guard(device);
  if (const char* error = cuda_error_text(guard.error())) return error;
  int multiprocessors = 0;
  if (const char* error =
          cuda_error_text(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)))
    return error;

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (op.dtype == DType::f16) return launch_nm24_grad_values<__half>(op, multiprocessors, cuda_stream);
  return launch_nm24_grad_values<__nv_bfloat16>(op, multiprocessors, cuda_stream);
}

}  // namespace sparseops
