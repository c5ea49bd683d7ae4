// sparseops._C: the kernels as functions of raw pointers. Tensors are checked and made in Python (sparseops/ops), so no
// torch type appears here and one build serves every version of torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "ops.h"

// The tests build a second module of another name, whose CUDA kernels run on the CPU.
#ifdef SPARSEOPS_MODULE
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#define SPARSEOPS_MODULE _C
#endif

namespace py = pybind11;
using namespace sparseops;

namespace {

using Pointer = uintptr_t;  // Tensor.data_ptr(); 0 is no tensor

template <class T = void>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

void nm24_linear(Pointer x, int64_t x_stride, Pointer values, Pointer meta, Pointer bias, Pointer y, int64_t tokens,
                 int64_t in_features, int64_t out_features, int64_t packed_cols, int dtype, int activation,
                 int threads) {
  const py::gil_scoped_release release;
  cpu_nm24_linear({at(x),
                   x_stride,
                   {at(values), at<uint8_t>(meta), out_features, packed_cols},
                   at(bias),
                   at(y),
                   tokens,
                   in_features,
                   DType(dtype),
                   Activation(activation),
                   threads});
}

void nm24_conv(Pointer x, Pointer values, Pointer meta, Pointer bias, Pointer y, int64_t batch, int64_t channels,
               int64_t height, int64_t width, int64_t out_channels, int64_t out_height, int64_t out_width,
               int64_t packed_cols, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
               int64_t pad_top, int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t groups,
               bool channels_last, int dtype, int activation, int threads) {
  const py::gil_scoped_release release;
  cpu_nm24_conv({at(x),        {at(values), at<uint8_t>(meta), out_channels, packed_cols},
                 at(bias),     at(y),
                 batch,        channels,
                 height,       width,
                 out_height,   out_width,
                 kernel_h,     kernel_w,
                 stride_h,     stride_w,
                 pad_top,      pad_left,
                 dilation_h,   dilation_w,
                 groups,       channels_last,
                 DType(dtype), Activation(activation),
                 threads});
}

void channel_copy(Pointer x, int64_t x_channels, Pointer y, int64_t y_channels, Pointer constants, Pointer runs,
                  int64_t run_count, int64_t images, int64_t pixels, bool x_planes, bool y_planes, int element_size,
                  int threads) {
  const py::gil_scoped_release release;
  cpu_channel_copy({at(x), x_channels, at(y), y_channels, at(constants), at<ChannelRun>(runs), run_count, images,
                    pixels, x_planes, y_planes, element_size, threads});
}

// What a CUDA function says: null, or a text.
void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

py::list list_cuda_tiles() {
  int count = 0;
  const CudaTile* tiles = cuda_tiles(&count);
  py::list list;
  for (int i = 0; i < count; ++i)
    list.append(py::make_tuple(tiles[i].name, tiles[i].features, tiles[i].tokens, tiles[i].depth, tiles[i].consumers,
                               tiles[i].arch));
  return list;
}

void nm24_linear_cuda(Pointer x, int64_t x_stride, Pointer values, Pointer fragments, Pointer slabs, int64_t rows,
                      int64_t packed_cols, int64_t slab_rows, Pointer bias, Pointer residual, Pointer x_scale,
                      Pointer w_scale, int out_dtype, int activation, Pointer y, int64_t tokens, int64_t in_features,
                      int dtype, int tile, int splits, int cluster, int blocks, Pointer partials, Pointer counters,
                      int device, Pointer stream) {
  const py::gil_scoped_release release;
  check(cuda_nm24_linear(
      {at(x),
       x_stride,
       {at(values), at(slabs), rows, packed_cols, slab_rows, at(fragments)},
       {at(bias), at(residual), at<float>(x_scale), at<float>(w_scale), DType(out_dtype), Activation(activation)},
       at(y),
       tokens,
       in_features,
       DType(dtype)},
      {TileShape(tile), splits, cluster, blocks, at(partials), at<uint32_t>(counters), device, at(stream)}));
}

void nm24_conv_cuda(Pointer x, Pointer values, Pointer slabs, int64_t rows, int64_t packed_cols, int64_t slab_rows,
                    Pointer bias, Pointer residual, int out_dtype, int activation, Pointer y, int64_t batch,
                    int64_t channels, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                    int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                    int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t groups, int dtype, int tile,
                    int splits, int cluster, int blocks, Pointer partials, Pointer counters, int device,
                    Pointer stream) {
  const py::gil_scoped_release release;
  check(cuda_nm24_conv(
      {at(x),
       {at(values), at(slabs), rows, packed_cols, slab_rows, nullptr},
       {at(bias), at(residual), nullptr, nullptr, DType(out_dtype), Activation(activation)},
       at(y),
       batch,
       channels,
       height,
       width,
       out_height,
       out_width,
       kernel_h,
       kernel_w,
       stride_h,
       stride_w,
       pad_top,
       pad_left,
       dilation_h,
       dilation_w,
       groups,
       DType(dtype)},
      {TileShape(tile), splits, cluster, blocks, at(partials), at<uint32_t>(counters), device, at(stream)}));
}

void nm24_compress_cuda(Pointer dense, Pointer values, Pointer meta, int64_t rows, int64_t packed_cols, int dtype,
                        int device, Pointer stream) {
  const py::gil_scoped_release release;
  check(cuda_nm24_compress(at(dense), at(values), at<uint8_t>(meta), rows, packed_cols, DType(dtype), device,
                           at(stream)));
}

void nm24_grad_values_cuda(Pointer grad, int64_t grad_stride, Pointer x, int64_t x_stride, Pointer meta,
                           Pointer grad_values, int64_t tokens, int64_t rows, int64_t in_features, int64_t packed_cols,
                           int dtype, int device, Pointer stream) {
  const py::gil_scoped_release release;
  check(cuda_nm24_grad_values({at(grad), grad_stride, at(x), x_stride, at<uint8_t>(meta), at(grad_values), tokens, rows,
                               in_features, packed_cols, DType(dtype)},
                              device, at(stream)));
}

void nm24_to_dense_cuda(Pointer values, Pointer meta, Pointer dense, int64_t rows, int64_t packed_cols,
                        int element_size, int device, Pointer stream) {
  const py::gil_scoped_release release;
  const NM24Weight weight{at(values), at<uint8_t>(meta), rows, packed_cols};
  check(cuda_nm24_to_dense(weight, at(dense), element_size, device, at(stream)));
}

const char* const kIsas[] = {"portable", "avx2", "avx512", "avx512_bf16"};

void use_isa(const std::string& name) {
  if (!cpu_supports(name.c_str()))
    throw py::value_error(
        "cpu_use_isa: name must be an instruction set that was built and that this processor has, got " + name);
  cpu_use_isa(name.c_str());
}

py::dict build_info() {
  py::list isas;
  for (const char* isa : kIsas)
    if (cpu_built(isa)) isas.append(isa);
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
  using namespace py::literals;
  return py::dict("compiler"_a = compiler, "openmp"_a = openmp, "isas"_a = isas, "cuda"_a = cuda_built(),
                  "cuda_archs"_a = cuda_archs());
}

py::dict probe_cuda() {
  using namespace py::literals;
  const CudaInfo info = cuda_probe();
  return py::dict("error"_a = info.error ? py::object(py::str(info.error)) : py::none(), "driver"_a = info.driver,
                  "runtime"_a = info.runtime, "devices"_a = info.devices);
}

}  // namespace

PYBIND11_MODULE(SPARSEOPS_MODULE, m) {
  m.def("nm24_linear", &nm24_linear);
  m.def("nm24_conv", &nm24_conv);
  m.def("channel_copy", &channel_copy);
  m.def("nm24_linear_cuda", &nm24_linear_cuda);
  m.def("nm24_conv_cuda", &nm24_conv_cuda);
  m.def("nm24_compress_cuda", &nm24_compress_cuda);
  m.def("nm24_grad_values_cuda", &nm24_grad_values_cuda);
  m.def("nm24_to_dense_cuda", &nm24_to_dense_cuda);
  m.def("build_info", &build_info);
  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_supports", [](const std::string& name) { return cpu_supports(name.c_str()); });
  m.def("cpu_use_isa", &use_isa);
  m.def("cuda_probe", &probe_cuda);
  m.def("cuda_tiles", &list_cuda_tiles);
  m.def("emulated", [] { return kEmulated; });
}
