// Between the host sides of the ops and those of their kernels for sm_90a: calls have passed the ops' own checks, and the
// device is current.
#pragma once
#include "ops.h"

namespace sparseops {

inline bool is_sm90(TileShape tile) { return tile >= TileShape::sm90_128x8; }

const char* nm24_linear_sm90_f16(const CudaNM24Linear& op, const CudaPlan& plan);
const char* nm24_linear_sm90_bf16(const CudaNM24Linear& op, const CudaPlan& plan);
const char* nm24_linear_sm90_e4m3(const CudaNM24Linear& op, const CudaPlan& plan);
const char* nm24_linear_sm90_i8(const CudaNM24Linear& op, const CudaPlan& plan);
const char* nm24_conv_sm90(const CudaNM24Conv& op, const CudaPlan& plan);

}  // namespace sparseops
