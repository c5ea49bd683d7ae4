// The functions of the CUDA driver that csrc/cuda calls, which asks the runtime for their addresses. They refuse what
// cuda.h says of them, and throw at what no copy here understands.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <string>

#include "block.h"
#include "tensor_map.h"

namespace sparseops_emulation {
namespace {

[[noreturn]] void not_emulated(const char* what) { throw Error(std::string("tensor map: ") + what + " not emulated"); }

// The bytes of an element.
unsigned bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    case CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B:
    case CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B:
    case CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B:
      break;
  }
  not_emulated("packed types are");
}

bool is_floating(CUtensorMapDataType type) {
  return type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type <= CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ;
}

template <class T>
bool within(T value, T least, T most) {
  return value >= least && value <= most;
}

// What both kinds of map have in common.
struct Common {
  CUtensorMap* out;
  CUtensorMapDataType type;
  cuuint32_t rank;
  void* base;
  const cuuint64_t *size, *strides;
  const cuuint32_t* steps;
  CUtensorMapInterleave interleave;
  CUtensorMapSwizzle swizzle;
  CUtensorMapFloatOOBfill fill;
};

// Fills `map`; false for what the driver refuses. It does not compare a stride with the sizes below it, so neither is
// it done here: the example in cuda.h is one layout of many.
bool describe(const Common& c, TensorMap& map) {
  map.rank = std::uint8_t(c.rank);
  map.base = static_cast<std::byte*>(c.base);
  const bool pointers = c.out && c.base && c.size && (c.strides || c.rank == 1) && c.steps;
  if (!pointers || reinterpret_cast<std::uintptr_t>(c.out) % 64) return false;
  if (c.interleave > CU_TENSOR_MAP_INTERLEAVE_32B || c.swizzle > CU_TENSOR_MAP_SWIZZLE_128B_ATOM_64B) return false;
  if (c.fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && !is_floating(c.type)) return false;
  if (reinterpret_cast<std::uintptr_t>(c.base) % 16) return false;
  map.element = std::uint8_t(bytes_of(c.type));
  for (cuuint32_t d = 0; d < c.rank; ++d) {
    map.size[d] = c.size[d];
    if (!within<cuuint64_t>(c.size[d], 1, cuuint64_t{1} << 32)) return false;
    if (d == 0) continue;  // has neither a stride nor a step
    map.stride[d] = c.strides[d - 1];
    map.step[d] = std::uint8_t(c.steps[d]);
    if (c.strides[d - 1] % 16 || c.strides[d - 1] >= cuuint64_t{1} << 40 || !within(c.steps[d], 1u, 8u)) return false;
  }
  if (c.interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) not_emulated("interleaved layouts are");
  if (c.swizzle > CU_TENSOR_MAP_SWIZZLE_128B) not_emulated("exchanges of other than 16 bytes are");
  if (c.fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) not_emulated("a filling with NaNs is");
  map.span = c.swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : std::uint8_t(16 << int(c.swizzle));
  return true;
}

// After the sizes of the box were checked: its rows in shared memory.
bool rows_fit(const TensorMap& map) {
  if (map.span && map.row_bytes() > map.span) return false;
  if (map.span && map.row_bytes() < map.span) not_emulated("a box that is narrower than what is exchanged is");
  return true;
}

CUresult encode_tiled(const Common& c, const cuuint32_t* box) {
  TensorMap map;
  map.mode = TensorMap::Mode::tile;
  if (!within<cuuint32_t>(c.rank, 1, TensorMap::kMaxRank) || !box || !describe(c, map)) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t d = 0; d < c.rank; ++d) {
    if (!within(box[d], 1u, 256u)) return CUDA_ERROR_INVALID_VALUE;
    map.box[d] = std::uint16_t(box[d]);
  }
  if (map.row_bytes() % 16 || !rows_fit(map)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(c.out, &map, sizeof map);
  return CUDA_SUCCESS;
}

// The corners are given along w, h, d: CUTLASS's order, where cuda.h names another.
CUresult encode_im2col(const Common& c, const int* lower, const int* upper, cuuint32_t channels, cuuint32_t pixels) {
  TensorMap map;
  map.mode = TensorMap::Mode::im2col;
  if (!within<cuuint32_t>(c.rank, 3, TensorMap::kMaxRank) || !lower || !upper || !describe(c, map))
    return CUDA_ERROR_INVALID_VALUE;
  constexpr int kReach[] = {32768, 128, 16};  // of rank 3, 4, 5
  const int reach = kReach[c.rank - 3];
  for (cuuint32_t i = 0; i + 2 < c.rank; ++i) {
    if (!within(lower[i], -reach, reach - 1) || !within(upper[i], -reach, reach - 1)) return CUDA_ERROR_INVALID_VALUE;
    map.lower[i] = std::int16_t(lower[i]);
    map.upper[i] = std::int16_t(upper[i]);
    if (map.end(int(i)) <= lower[i]) return CUDA_ERROR_INVALID_VALUE;  // the corners hold no pixel
  }
  if (!within(channels, 1u, 256u) || !within(pixels, 1u, 1024u)) return CUDA_ERROR_INVALID_VALUE;
  map.box[0] = std::uint16_t(channels);
  map.box[1] = std::uint16_t(pixels);
  if (!rows_fit(map)) return CUDA_ERROR_INVALID_VALUE;
  if (c.rank != 4) not_emulated("pixels of other than two dimensions are");
  if (map.row_bytes() % 16) not_emulated("pixels that are no multiple of 16 bytes are");
  if (map.step[3] != 1) not_emulated("a step from image to image is");
  std::memcpy(c.out, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace sparseops_emulation

CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                        const cuuint64_t* size, const cuuint64_t* strides, const cuuint32_t* box,
                                        const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                        CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                        CUtensorMapFloatOOBfill fill) {
  return sparseops_emulation::encode_tiled({map, type, rank, base, size, strides, steps, interleave, swizzle, fill},
                                           box);
}

CUresult CUDAAPI cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                         const cuuint64_t* size, const cuuint64_t* strides, const int* lower,
                                         const int* upper, cuuint32_t channels, cuuint32_t pixels,
                                         const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                         CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                         CUtensorMapFloatOOBfill fill) {
  return sparseops_emulation::encode_im2col({map, type, rank, base, size, strides, steps, interleave, swizzle, fill},
                                            lower, upper, channels, pixels);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int version,
                                             unsigned long long, cudaDriverEntryPointQueryResult* status) {
  constexpr unsigned kBoth = 12000;  // the version that brought them
  *function = nullptr;
  if (version > CUDART_VERSION) return cudaErrorInvalidValue;
  if (std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0)
    *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  else if (std::strcmp(symbol, "cuTensorMapEncodeIm2col") == 0)
    *function = reinterpret_cast<void*>(&cuTensorMapEncodeIm2col);
  cudaDriverEntryPointQueryResult found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (*function && version < kBoth) {
    *function = nullptr;
    found = cudaDriverEntryPointVersionNotSufficent;
  }
  if (status) *status = found;
  return cudaSuccess;
}
