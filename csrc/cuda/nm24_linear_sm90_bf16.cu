// archs: 90a
#include "cuda/launch_linear_sm90.cuh"

namespace sparseops {

const char* nm24_linear_sm90_bf16(const CudaNM24Linear& op, const CudaPlan& plan) {
  return launch_linear_sm90<__nv_bfloat16>(op, plan);
}

}  // namespace sparseops
