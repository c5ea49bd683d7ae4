// The emulated driver's tensor maps: what cuda.h says that it refuses.
#include <cuda.h>
#include <cudaTypedefs.h>

#include "test_support.h"

namespace {

template <class Function>
Function entry(const char* name, unsigned version = 12000) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    throw emu::Error(std::string("there is no ") + name);
  return reinterpret_cast<Function>(function);
}

// A call that is right, for a test to spoil.
struct Arguments {
  alignas(64) std::byte memory[2048] = {};
  CUtensorMap* map = reinterpret_cast<CUtensorMap*>(memory);
  void* base = memory + 1024;
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint32_t rank = 4;
  cuuint64_t size[6] = {64, 9, 7, 2, 3, 1}, strides[5] = {128, 1152, 8064, 16128, 48384};
  bool no_strides = false;
  cuuint32_t box[6] = {32, 4, 4, 2, 1, 1}, steps[6] = {1, 1, 1, 1, 1, 1};
  int lower[4] = {-1, -1, -1, 0}, upper[4] = {-1, -1, -1, 0};
  cuuint32_t channels = 32, pixels = 64;
  CUtensorMapInterleave interleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_64B;
  CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  CUtensorMapFloatOOBfill fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;

  CUresult tiled() {
    return entry<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled")(
        map, type, rank, base, size, no_strides ? nullptr : strides, box, steps, interleave, swizzle, promotion, fill);
  }
  CUresult im2col() {
    return entry<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col")(map, type, rank, base, size, strides,
                                                                                lower, upper, channels, pixels, steps,
                                                                                interleave, swizzle, promotion, fill);
  }
};

enum class Kind { tiled, im2col };

template <class Spoil>
CUresult encode(Kind kind, Spoil spoil) {
  Arguments arguments;
  spoil(arguments);
  return kind == Kind::tiled ? arguments.tiled() : arguments.im2col();
}

template <class Spoil>
void taken(Kind kind, const char* what, Spoil spoil) {
  if (encode(kind, spoil) != CUDA_SUCCESS) throw emu::Error(std::string("refused: ") + what);
}
template <class Spoil>
void refused(Kind kind, const char* what, Spoil spoil) {
  if (encode(kind, spoil) != CUDA_ERROR_INVALID_VALUE) throw emu::Error(std::string("not refused: ") + what);
}
template <class Spoil>
void not_emulated(Kind kind, Spoil spoil) {
  emu::expect_error("not emulated", [&] { encode(kind, spoil); });
}

void common(Kind kind) {
  using A = Arguments;
  taken(kind, "what is right", [](A&) {});
  refused(kind, "map at no multiple of 64", [](A& a) { a.map = reinterpret_cast<CUtensorMap*>(a.memory + 32); });
  refused(kind, "no map", [](A& a) { a.map = nullptr; });
  refused(kind, "no tensor", [](A& a) { a.base = nullptr; });
  refused(kind, "tensor at no multiple of 16", [](A& a) { a.base = a.memory + 1032; });
  taken(kind, "tensor at a multiple of 16", [](A& a) { a.base = a.memory + 1040; });
  refused(kind, "rank 0", [](A& a) { a.rank = 0; });
  refused(kind, "rank 6", [](A& a) { a.rank = 6; });
  for (int d = 0; d < 4; ++d) {
    refused(kind, "size 0", [=](A& a) { a.size[d] = 0; });
    refused(kind, "size 2^32 + 1", [=](A& a) { a.size[d] = (1ull << 32) + 1; });
    taken(kind, "size 2^32", [=](A& a) { a.size[d] = 1ull << 32; });
  }
  for (int d = 0; d < 3; ++d) {
    refused(kind, "stride of 8 bytes more", [=](A& a) { a.strides[d] += 8; });
    taken(kind, "stride of 16 bytes more", [=](A& a) { a.strides[d] += 16; });
    refused(kind, "stride 2^40", [=](A& a) { a.strides[d] = 1ull << 40; });
    taken(kind, "stride below 2^40", [=](A& a) { a.strides[d] = (1ull << 40) - 16; });
  }
  refused(kind, "interleave", [](A& a) { a.interleave = CUtensorMapInterleave(3); });
  refused(kind, "swizzle", [](A& a) { a.swizzle = CUtensorMapSwizzle(7); });
  refused(kind, "NaNs of integers", [](A& a) {
    a.type = CU_TENSOR_MAP_DATA_TYPE_UINT16;
    a.fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
  });
  not_emulated(kind, [](A& a) { a.fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA; });
  not_emulated(kind, [](A& a) {
    a.type = CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ;
    a.fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
  });
  for (const auto interleave : {CU_TENSOR_MAP_INTERLEAVE_16B, CU_TENSOR_MAP_INTERLEAVE_32B})
    not_emulated(kind, [=](A& a) { a.interleave = interleave; });
  for (const auto swizzle : {CU_TENSOR_MAP_SWIZZLE_128B_ATOM_32B, CU_TENSOR_MAP_SWIZZLE_128B_ATOM_64B})
    not_emulated(kind, [=](A& a) { a.swizzle = swizzle; });
  not_emulated(kind, [](A& a) { a.type = CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B; });
  taken(kind, "step 0 of dimension 0, which is ignored", [](A& a) { a.steps[0] = 0; });
  for (int d = 1; d < 3; ++d) {
    refused(kind, "step 0", [=](A& a) { a.steps[d] = 0; });
    refused(kind, "step 9", [=](A& a) { a.steps[d] = 9; });
    taken(kind, "step 8", [=](A& a) { a.steps[d] = 8; });
  }
}

void tiled() {
  using A = Arguments;
  constexpr Kind kind = Kind::tiled;
  for (cuuint32_t rank = 1; rank <= 5; ++rank) taken(kind, "rank", [=](A& a) { a.rank = rank; });
  const auto without_strides = [](cuuint32_t rank) {
    return [=](A& a) {
      a.rank = rank;
      a.no_strides = true;
    };
  };
  taken(kind, "one dimension without strides", without_strides(1));
  refused(kind, "two dimensions without strides", without_strides(2));
  for (int d = 0; d < 4; ++d) refused(kind, "box 0", [=](A& a) { a.box[d] = 0; });
  for (int d = 1; d < 4; ++d) {
    refused(kind, "box 257", [=](A& a) { a.box[d] = 257; });
    taken(kind, "box 256", [=](A& a) { a.box[d] = 256; });
  }
  const auto row = [](CUtensorMapSwizzle swizzle, cuuint32_t elements) {
    return [=](A& a) {
      a.swizzle = swizzle;
      a.box[0] = elements;
    };
  };
  taken(kind, "256 elements", row(CU_TENSOR_MAP_SWIZZLE_NONE, 256));
  refused(kind, "257 elements", row(CU_TENSOR_MAP_SWIZZLE_NONE, 257));
  refused(kind, "row of 24 bytes", row(CU_TENSOR_MAP_SWIZZLE_NONE, 12));
  taken(kind, "row of 48 bytes", row(CU_TENSOR_MAP_SWIZZLE_NONE, 24));
  constexpr int kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // in the order of the types
  for (int i = 0; i < 13; ++i) {
    const auto of_type = [=](cuuint32_t elements) {
      return [=](A& a) {
        row(CU_TENSOR_MAP_SWIZZLE_NONE, elements)(a);
        a.type = CUtensorMapDataType(i);
      };
    };
    taken(kind, "16 bytes", of_type(16 / kBytes[i]));
    refused(kind, "8 bytes", of_type(8 / kBytes[i]));
    refused(kind, "24 bytes", of_type(24 / kBytes[i]));
  }
  for (const auto& [swizzle, elements] : {std::pair{CU_TENSOR_MAP_SWIZZLE_32B, 16u},
                                          {CU_TENSOR_MAP_SWIZZLE_64B, 32u},
                                          {CU_TENSOR_MAP_SWIZZLE_128B, 64u}}) {
    taken(kind, "row as long as what is exchanged", row(swizzle, elements));
    refused(kind, "row longer than what is exchanged", row(swizzle, elements + 8));
    not_emulated(kind, row(swizzle, elements - 8));
  }
}

void im2col() {
  using A = Arguments;
  constexpr Kind kind = Kind::im2col;
  for (const cuuint32_t rank : {1u, 2u}) refused(kind, "rank", [=](A& a) { a.rank = rank; });
  for (const cuuint32_t rank : {3u, 5u}) not_emulated(kind, [=](A& a) { a.rank = rank; });
  for (int i = 0; i < 2; ++i) {
    const auto corners = [=](int lower, int upper, cuuint64_t size = 300) {
      return [=](A& a) {
        a.size[i + 1] = size;
        a.lower[i] = lower;
        a.upper[i] = upper;
      };
    };
    taken(kind, "corners -128, 127", corners(-128, 127));
    taken(kind, "corners 127, -128", corners(127, -128));
    refused(kind, "lower corner -129", corners(-129, 0));
    refused(kind, "lower corner 128", corners(128, 0));
    refused(kind, "upper corner -129", corners(0, -129));
    refused(kind, "upper corner 128", corners(0, 128));
    taken(kind, "corners with one pixel", corners(3, -4, 8));
    refused(kind, "corners without a pixel", corners(3, -5, 8));
  }
  refused(kind, "lower corner of rank 5", [](A& a) { a.rank = 5, a.lower[0] = -17; });
  refused(kind, "no channels", [](A& a) { a.channels = 0; });
  refused(kind, "no pixels", [](A& a) { a.pixels = 0; });
  refused(kind, "1025 pixels", [](A& a) { a.pixels = 1025; });
  taken(kind, "1024 pixels", [](A& a) { a.pixels = 1024; });
  refused(kind, "channels that are more than what is exchanged", [](A& a) { a.channels = 40; });
  const auto unswizzled = [](cuuint32_t channels) {
    return [=](A& a) {
      a.swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
      a.channels = channels;
    };
  };
  taken(kind, "256 channels", unswizzled(256));
  refused(kind, "257 channels", unswizzled(257));
  not_emulated(kind, unswizzled(12));
  not_emulated(kind, [](A& a) { a.channels = 24; });
  not_emulated(kind, [](A& a) { a.steps[3] = 2; });
}

void entry_points() {
  void* function = nullptr;
  const auto found = [&](const char* name, unsigned version) {
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &result) != cudaSuccess)
      throw emu::Error("an error where there is none");
    return result;
  };
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw emu::Error(what);
  };
  for (const char* name : {"cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"}) {
    require(found(name, 12000) == cudaDriverEntryPointSuccess && function, name);
    require(found(name, 13000) == cudaDriverEntryPointSuccess && function, name);
    require(found(name, 11080) == cudaDriverEntryPointVersionNotSufficent && !function, name);
  }
  require(found("cuTensorMapReplaceAddress", 12000) == cudaDriverEntryPointSymbolNotFound && !function,
          "what there is not");
  require(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 99000, cudaEnableDefault, nullptr) ==
              cudaErrorInvalidValue,
          "a version that is later than the driver's");
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  tests.run("entry points", entry_points);
  tests.run("tiled maps, as any", [] { common(Kind::tiled); });
  tests.run("im2col maps, as any", [] { common(Kind::im2col); });
  tests.run("tiled maps", tiled);
  tests.run("im2col maps", im2col);
  return tests.result();
}
