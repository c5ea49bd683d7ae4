// archs: 90a
#include "cuda/launch_linear_sm90.cuh"

namespace sparseops {

const char* nm24_linear_sm90_e4m3(const CudaNM24Linear& op, const CudaPlan& plan) {
  return launch_linear_sm90<__nv_fp8_e4m3>(op, plan);
}

}  // namespace sparseops
