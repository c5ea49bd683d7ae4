// archs: 90a
#include "cuda/launch_linear_sm90.cuh"

namespace sparseops {

const char* nm24_linear_sm90_i8(const CudaNM24Linear& op, const CudaPlan& plan) {
  return launch_linear_sm90<int8_t>(op, plan);
}

}  // namespace sparseops
