// Tensors, and the boxes of them that the copy engine moves, for its tests: naive, and apart from the emulator's code.
#pragma once
#include <cuda.h>

#include "reference_matrices.h"
#include "test_support.h"

namespace sparseops_emulation {

using Bytes = std::vector<unsigned char>;

struct Tensor {
  int element;
  std::vector<int64_t> size, stride;  // stride in bytes, of dimension 0 too
  Buffer<unsigned char> data;

  Tensor(int element, const std::vector<int64_t>& size, Random& random, int padding = 0)
      : element(element),
        size(size),
        stride(strides(element, size, padding)),
        data(random.normal<unsigned char>(bytes())) {}

  size_t bytes() const {
    int64_t last = element;
    for (size_t d = 0; d < size.size(); ++d) last += (size[d] - 1) * stride[d];
    return size_t(last);
  }
  bool holds(const std::vector<int64_t>& at) const {
    for (size_t d = 0; d < size.size(); ++d)
      if (at[d] < 0 || at[d] >= size[d]) return false;
    return true;
  }
  unsigned char* operator[](const std::vector<int64_t>& at) { return data.data() + offset(at); }
  int64_t offset(const std::vector<int64_t>& at) const {
    int64_t offset = 0;
    for (size_t d = 0; d < size.size(); ++d) offset += at[d] * stride[d];
    return offset;
  }

 private:
  static std::vector<int64_t> strides(int element, const std::vector<int64_t>& size, int padding) {
    std::vector<int64_t> stride = {element};
    for (size_t d = 0; d + 1 < size.size(); ++d) stride.push_back((stride[d] * size[d] + padding + 15) / 16 * 16);
    return stride;
  }
};

inline CUtensorMapSwizzle swizzle_of(int span) {
  return span == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : span == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
         : span == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                      : CU_TENSOR_MAP_SWIZZLE_NONE;
}
inline CUtensorMapDataType type_of(int element) {
  return element == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
         : element == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
         : element == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                        : CU_TENSOR_MAP_DATA_TYPE_UINT64;
}

struct Box {
  std::vector<int64_t> size, step;
  int span = 0;

  // How many elements are copied along each dimension: every step-th.
  std::vector<int64_t> counts() const {
    std::vector<int64_t> counts;
    for (size_t d = 0; d < size.size(); ++d) counts.push_back((size[d] + step[d] - 1) / step[d]);
    return counts;
  }
  // f(index of the element in the box, where it is in the tensor) for each.
  template <class F>
  void for_each(const std::vector<int>& at, F f) const {
    const auto count = counts();
    std::vector<int64_t> i(size.size(), 0);
    for (int64_t index = 0;; ++index) {
      std::vector<int64_t> c;
      for (size_t d = 0; d < i.size(); ++d) c.push_back(at[d] + i[d] * step[d]);
      f(index, c);
      size_t d = 0;
      while (d < i.size() && ++i[d] == count[d]) i[d++] = 0;
      if (d == i.size()) return;
    }
  }
  int64_t elements() const {
    int64_t elements = 1;
    for (const int64_t count : counts()) elements *= count;
    return elements;
  }
};
inline Box box_of(const std::vector<int64_t>& size, int span = 0) {
  return {size, std::vector<int64_t>(size.size(), 1), span};
}

inline CUtensorMap encode(Tensor& tensor, const Box& box) {
  CUtensorMap map;
  cuuint64_t size[5], strides[5];
  cuuint32_t extent[5], steps[5];
  const size_t rank = tensor.size.size();
  for (size_t d = 0; d < rank; ++d) {
    size[d] = cuuint64_t(tensor.size[d]);
    strides[d] = cuuint64_t(tensor.stride[d]);
    extent[d] = cuuint32_t(box.size[d]);
    steps[d] = cuuint32_t(box.step[d]);
  }
  if (cuTensorMapEncodeTiled(&map, type_of(tensor.element), cuuint32_t(rank), tensor.data.data(), size, strides + 1,
                             extent, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(box.span),
                             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
    throw Error("the map was refused");
  return map;
}

// Where element `index` of a box is in shared memory.
inline int64_t in_shared(int64_t index, int element, int span) {
  const int64_t byte = index * element;
  return exchanged(int(byte / 16), span) * 16 + byte % 16;
}

// Coordinates, as a kernel takes them.
struct At {
  int c[5] = {};
  At(const std::vector<int>& at) { std::copy(at.begin(), at.end(), c); }
};

}  // namespace sparseops_emulation
