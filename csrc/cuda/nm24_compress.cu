// archs: all
// Host side of nm24_compress.cuh: checks what the kernel assumes, makes the device current, launches.
#include "cuda/nm24_compress.cuh"

#include <climits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "ops.h"

namespace sparseops {
namespace {

const char* refuse(const void* dense, const void* values, int64_t rows, int64_t cols, DType dtype) {
  if (dtype != DType::f32 && dtype != DType::f16 && dtype != DType::bf16)
    return "nm24_compress: dtype must be f32, f16 or bf16";
  if (rows < 0 || cols < 0 || cols % 32 != 0)
    return "nm24_compress: cols must be a multiple of 32 and rows not negative";
  if (!aligned(dense, 16)) return "nm24_compress: dense must begin at a multiple of 16 bytes";
  if (!aligned(values, 8)) return "nm24_compress: values must begin at a multiple of 8 bytes";
  return nullptr;
}

template <class Bits>
const char* launch_nm24_compress(const void* dense, void* values, uint8_t* meta, int64_t elements,
                                 cudaStream_t stream) {
  using Config = NM24CompressConfig<Bits>;
  const int64_t units = elements / Config::kColumns;
  const int64_t blocks = ceil_div(units, Config::kThreads);
  if (blocks > INT_MAX) return "nm24_compress: the weight must hold fewer than 2^31 blocks of 256 x 16 bytes";
  return cuda_error_text(launch(nm24_compress_kernel<Bits>, dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads),
                                0, stream, dense, values, meta, units));
}

}  // namespace

const char* cuda_nm24_compress(const void* dense, void* values, uint8_t* meta, int64_t rows, int64_t cols, DType dtype,
                               int device, void* stream) {
  if (const char* refused = refuse(dense, values, rows, cols, dtype)) return refused;
  if (rows == 0 || cols == 0) return nullptr;

  const DeviceGuard guard(device);
  if (const char* error = cuda_error_text(guard.error())) return error;

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::f16:
      return launch_nm24_compress<F16Bits>(dense, values, meta, rows * cols, cuda_stream);
    case DType::bf16:
      return launch_nm24_compress<BF16Bits>(dense, values, meta, rows * cols, cuda_stream);
    default:
      return launch_nm24_compress<F32Bits>(dense, values, meta, rows * cols, cuda_stream);
  }
}

}  // namespace sparseops
