// The one way to start a kernel, on the GPU and, in tests, on the CPU.
#pragma once
#include <cuda_runtime.h>

#if !defined(__CUDACC__)
#include "cuda_emulation.h"
#endif

namespace sparseops {

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), and whether it could be started.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
#if defined(__CUDACC__)
  constexpr size_t kWithoutAsking = 48 * 1024;  // of dynamic shared memory
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
#else
  static_cast<void>(stream);
  return emu::launch(kernel, grid, block, shared_bytes, arguments...);
#endif
}

}  // namespace sparseops
