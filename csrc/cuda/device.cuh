// What host launchers need: the device made current for the length of a call, errors as sentences, small checks.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sparseops {

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The text of a CUDA error, with the cure where one is known; null for success. Lives for the whole process.
const char* cuda_error_text(cudaError_t error);

// Makes `device` current and puts the previous one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(cudaGetDevice(&previous_)) {
    if (error_ != cudaSuccess || previous_ == device) return;
    error_ = cudaSetDevice(device);
    restore_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int previous_ = -1;
  bool restore_ = false;
  cudaError_t error_;
};

}  // namespace sparseops
