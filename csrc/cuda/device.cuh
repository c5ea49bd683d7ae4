// What every host launcher needs: the device made current for the length of a call, and errors as sentences.
#pragma once
#include <cuda_runtime.h>

namespace sparseops {

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
