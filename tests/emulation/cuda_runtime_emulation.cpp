// The functions of the CUDA runtime that csrc/cuda and the tests here call, for one emulated device. Its compute
// capability is EMU_CAPABILITY: 8.0, or 9.0.
#include "cuda_runtime_emulation.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "cuda_emulation.h"

namespace {

cudaError_t last_error = cudaSuccess;
cudaError_t told_error = cudaSuccess;  // the last one that has a text of its own
const char* told_text = nullptr;

cudaError_t fail_with(cudaError_t error, const std::string& text) {
  static std::set<std::string> texts;  // csrc/ops.h promises texts that live for the whole process
  told_error = error;
  told_text = texts.insert(text).first->c_str();
  return last_error = error;
}

struct Device {
  int major, multiprocessors, shared_bytes;
};

Device emulated_device() {
  const char* capability = std::getenv("EMU_CAPABILITY");
  if (!capability || std::strcmp(capability, "8.0") == 0) return {8, 108, 163 * 1024};
  if (std::strcmp(capability, "9.0") == 0) return {9, 132, 227 * 1024};
  std::fprintf(stderr, "EMU_CAPABILITY must be 8.0 or 9.0, got %s\n", capability);
  std::exit(2);
}

}  // namespace

namespace sparseops_emulation {

cudaError_t launch_grid(dim3 grid, dim3 block, std::size_t shared_bytes, unsigned cluster,
                        const std::function<void()>& thread) {
  try {
    run_grid(grid, block, shared_bytes, cluster, thread);
    return cudaSuccess;
  } catch (const Refused& refused) {
    return fail_with(cudaErrorInvalidConfiguration, refused.what());
  } catch (const Error& error) {
    return fail_with(cudaErrorLaunchFailure, error.what());
  }
}

}  // namespace sparseops_emulation

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : last_error = cudaErrorInvalidDevice; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  if (told_text && error == told_error) return told_text;
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "an error that the emulated CUDA runtime does not know";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return last_error = cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulated_device().major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulated_device().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulated_device().shared_bytes;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      return cudaSuccess;
    default:
      return fail_with(cudaErrorInvalidValue, "cudaDeviceGetAttribute: the emulator does not know this attribute");
  }
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return fail_with(cudaErrorInvalidValue, "cudaFuncSetAttribute: the emulator does not know this attribute");
  return value <= emulated_device().shared_bytes ? cudaSuccess : last_error = cudaErrorInvalidValue;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return last_error = cudaErrorInvalidDevice;
  *properties = {};
  std::strcpy(properties->name, "the emulator");
  properties->major = emulated_device().major;
  properties->minor = 0;
  properties->multiProcessorCount = emulated_device().multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }  // a launch returns when all is done

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = sparseops_emulation::allocate(bytes, 256).release();
  std::memset(*memory, 0xff, bytes);
  sparseops_emulation::memory::watch_global(*memory, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  sparseops_emulation::memory::forget_global(memory);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
