// Stands for csrc/cuda in a build without CUDA: the same functions, each with the reason.
#include "ops.h"

namespace sparseops {
namespace {

constexpr const char* kAbsent =
    "sparseops was built without CUDA kernels (SPARSEOPS_CUDA=0, or no nvcc when it was built)";

}  // namespace

bool cuda_built() { return false; }

const char* cuda_archs() { return ""; }

CudaInfo cuda_probe() { return {kAbsent, 0, 0, 0}; }

const CudaTile* cuda_tiles(int* count) {
  *count = 0;
  return nullptr;
}

const char* cuda_nm24_linear(const CudaNM24Linear&, const CudaPlan&) { return kAbsent; }

const char* cuda_nm24_conv(const CudaNM24Conv&, const CudaPlan&) { return kAbsent; }

const char* cuda_nm24_compress(const void*, void*, uint8_t*, int64_t, int64_t, DType, int, void*) { return kAbsent; }

const char* cuda_nm24_grad_values(const CudaNM24GradValues&, int, void*) { return kAbsent; }

const char* cuda_nm24_to_dense(const NM24Weight&, void*, int, int, void*) { return kAbsent; }

}  // namespace sparseops
