// archs: all
// Host side of nm24_to_dense.cuh: checks what the kernel assumes, makes the device current, launches.
#include "cuda/nm24_to_dense.cuh"

#include <climits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "ops.h"

namespace sparseops {
namespace {

const char* refuse(const NM24Weight& weight, const void* dense, int element_size) {
  if (element_size != 1 && element_size != 2 && element_size != 4)
    return "nm24_to_dense: element_size must be 1, 2 or 4 bytes";
  if (weight.rows < 0 || weight.cols < 0 || weight.cols % 32 != 0)
    return "nm24_to_dense: cols must be a multiple of 32 and rows not negative";
  if (!aligned(weight.values, 8)) return "nm24_to_dense: values must begin at a multiple of 8 bytes";
  if (!aligned(dense, 16)) return "nm24_to_dense: dense must begin at a multiple of 16 bytes";
  return nullptr;
}

template <int kElementSize>
const char* launch_nm24_to_dense(const NM24Weight& weight, void* dense, cudaStream_t stream) {
  using Config = NM24ToDenseConfig<kElementSize>;
  const int64_t units = weight.rows * (weight.cols / Config::kColumns);
  const int64_t blocks = (units + Config::kThreads - 1) / Config::kThreads;
  if (blocks > INT_MAX) return "nm24_to_dense: the weight must hold fewer than 2^31 blocks of 256 x 16 bytes";
  return cuda_error_text(launch(nm24_to_dense_kernel<kElementSize>, static_cast<unsigned>(blocks), Config::kThreads, 0,
                                stream, weight.values, weight.meta, dense, units));
}

}  // namespace

const char* cuda_nm24_to_dense(const NM24Weight& weight, void* dense, int element_size, int device, void* stream) {
  if (const char* refused = refuse(weight, dense, element_size)) return refused;
  if (weight.rows == 0 || weight.cols == 0) return nullptr;

  const DeviceGuard guard(device);
  if (const char* error = cuda_error_text(guard.error())) return error;

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (element_size) {
    case 1:
      return launch_nm24_to_dense<1>(weight, dense, cuda_stream);
    case 2:
      return launch_nm24_to_dense<2>(weight, dense, cuda_stream);
    default:
      return launch_nm24_to_dense<4>(weight, dense, cuda_stream);
  }
}

}  // namespace sparseops
