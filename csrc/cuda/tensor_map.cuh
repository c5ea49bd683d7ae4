// Host side: descriptions of tensors for the copy engine. The driver writes them; its functions are looked up at run
// time, so that nothing links against it.
#pragma once
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.cuh"
#include "ops.h"

namespace sparseops {

// The driver's function of this name, null if it has none.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned kSince = 12000;  // CUDA 12.0, as the types of cudaTypedefs.h that end in v12000
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, kSince, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

inline CUtensorMapDataType tensor_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case DType::f16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::bf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

inline int size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::f16 || dtype == DType::bf16 ? 2 : 1;
}

inline constexpr const char* kNoTensorMap =
    "the NVIDIA driver would not describe a tensor to the copy engine (cuTensorMapEncode): update it to one for CUDA "
    "12.0 or later, or set SPARSEOPS_IMPL to one of the tiles without sm90";

// Boxes of `box_rows` rows and 128 bytes of a matrix, swizzled by 128 bytes. `stride`: bytes between rows. Null, or why
// not.
inline const char* encode_matrix(CUtensorMap* map, DType dtype, const void* data, int64_t columns, int64_t rows,
                                 int64_t stride, int box_rows) {
  static const auto encode = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {cuuint64_t(stride)};
  const cuuint32_t box[] = {cuuint32_t(128 / size_of(dtype)), cuuint32_t(box_rows)}, steps[] = {1, 1};
  const bool done = encode && encode(map, tensor_type(dtype), 2, const_cast<void*>(data), sizes, strides, box, steps,
                                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == 0;
  return done ? nullptr : kNoTensorMap;
}

// Boxes of `box_pixels` pixels of 64 channels: those that a convolution's output pixels, in their order, have under the
// first tap of the filter.
inline const char* encode_pixels(CUtensorMap* map, const CudaNM24Conv& op, int box_pixels) {
  static const auto encode = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  const cuuint64_t element = size_of(op.dtype), row = op.width * op.channels * element;
  const cuuint64_t sizes[] = {cuuint64_t(op.channels), cuuint64_t(op.width), cuuint64_t(op.height),
                              cuuint64_t(op.batch)};
  const cuuint64_t strides[] = {op.channels * element, row, op.height * row};
  const cuuint32_t steps[] = {1, cuuint32_t(op.stride_w), cuuint32_t(op.stride_h), 1};
  // The first tap begins at -pad. It ends where the last output pixel is, so many pixels from the end of the image.
  const auto last = [](int64_t out, int64_t stride, int64_t pad, int64_t size) {
    return static_cast<int>((out - 1) * stride - pad - (size - 1));
  };
  const int lower[] = {static_cast<int>(-op.pad_left), static_cast<int>(-op.pad_top)};
  const int upper[] = {last(op.out_width, op.stride_w, op.pad_left, op.width),
                       last(op.out_height, op.stride_h, op.pad_top, op.height)};
  const bool done =
      encode && encode(map, tensor_type(op.dtype), 4, const_cast<void*>(op.x), sizes, strides, lower, upper, 64,
                       box_pixels, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == 0;
  return done ? nullptr : kNoTensorMap;
}

}  // namespace sparseops
