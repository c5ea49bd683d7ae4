// The ways to start a kernel, on the GPU and, in tests, on the CPU.
#pragma once
#include <cuda_runtime.h>

#if !defined(__CUDACC__)
#include "cuda_emulation.h"
#endif

namespace sparseops {

#if defined(__CUDACC__)
// Lets the kernel have as much dynamic shared memory as it will ask for.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
#endif

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), and whether it could be started.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
#if defined(__CUDACC__)
  if (const cudaError_t error = allow_shared_memory(kernel, shared_bytes)) return error;
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
#else
  static_cast<void>(stream);
  return emu::launch(kernel, grid, block, shared_bytes, arguments...);
#endif
}

// The same for a kernel of sm_90 whose blocks form clusters of `cluster`, and which may start before its predecessor in
// the stream has ended: it waits for that by ptx::wait_for_predecessor before it touches global memory.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster,
                            cudaStream_t stream, const Arguments&... arguments) {
#if defined(__CUDACC__)
  if (const cudaError_t error = allow_shared_memory(kernel, shared_bytes)) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error ? error : cudaGetLastError();
#else
  static_cast<void>(stream);
  return emu::launch_cluster(kernel, grid, block, shared_bytes, cluster, arguments...);
#endif
}

}  // namespace sparseops
