// archs: all
// What this build holds, and whether this machine can run it. The CUDA runtime is linked statically and looks for the
// driver only when it is first called: the module loads on a machine that has none.
#include "cuda/device.cuh"

#include <cstdio>

#include "ops.h"

namespace sparseops {
namespace {

constexpr int kMajor = CUDART_VERSION / 1000;
constexpr int kMinor = CUDART_VERSION % 1000 / 10;

const char* driver_text() {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "no NVIDIA driver was found on this machine (libcuda.so.1): install one";
  static char text[256];
  static const int length = std::snprintf(
      text, sizeof text,
      "the NVIDIA driver serves CUDA %d.%d, but sparseops was built with CUDA %d.%d: update the driver, or build "
      "again with an older toolkit (12.8 or later) named in CUDA_HOME",
      driver / 1000, driver % 1000 / 10, kMajor, kMinor);
  return length > 0 ? text : "the NVIDIA driver is too old for this build of sparseops";
}

}  // namespace

const char* cuda_error_text(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return nullptr;
    case cudaErrorInsufficientDriver:
      return driver_text();
    case cudaErrorNoKernelImageForDevice:
      return "sparseops was built for GPU architectures " SPARSEOPS_CUDA_ARCHS
             ", none of which this GPU runs: build again with its architecture in TORCH_CUDA_ARCH_LIST";
    default:
      return cudaGetErrorString(error);
  }
}

bool cuda_built() { return true; }

const char* cuda_archs() { return SPARSEOPS_CUDA_ARCHS; }

CudaInfo cuda_probe() {
  CudaInfo info{};
  cudaDriverGetVersion(&info.driver);
  cudaRuntimeGetVersion(&info.runtime);
  info.error = cuda_error_text(cudaGetDeviceCount(&info.devices));
  return info;
}

}  // namespace sparseops
