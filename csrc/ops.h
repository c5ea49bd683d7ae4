// The whole contract between the binding and the kernels: plain pointers, sizes, a stream. No torch.
//
// Everything a kernel may assume has been checked by the public Python function of its op
// (sparseops/ops/<op>.py): dtypes, shapes, strides, device, and that indices fit in 32 bits where noted.
#pragma once
#include <cstdint>

namespace sparseops {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, i8 = 3, e4m3 = 4 };
enum class Activation : int { none = 0, relu = 1, silu = 2, gelu = 3 };  // gelu is the exact one (erf)

// A 2:4 weight in its canonical form (sparseops/formats/nm24.py draws the layout).
struct NM24Weight {
  const void* values;   // [rows, cols/2], dtype of the activations
  const uint8_t* meta;  // [rows, cols/8], two bits per kept value
  int64_t rows;
  int64_t cols;  // packed columns, a multiple of 32
};

// y[t, m] = act(sum_k x[t, k] * w[m, k] + bias[m])
struct NM24Linear {
  const void* x;     // [tokens, in_features], unit stride along in_features
  int64_t x_stride;  // elements between tokens
  NM24Weight weight;
  const void* bias;  // [out_features] in dtype, or null
  void* y;           // [tokens, out_features], contiguous
  int64_t tokens, in_features;
  DType dtype;
  Activation activation;
  int threads;
};

// y[n, o, oh, ow] = act(sum_{r,s,c} x[n, c, oh*stride + r*dilation - pad, ...] * w[o, (r,s,c)] + bias[o])
struct NM24Conv {
  const void* x;            // [batch, channels, height, width], contiguous or channels_last
  NM24Weight weight;        // columns (r, s, c): each tap holds channels/groups rounded up to a multiple of 4
  const void* bias;         // [out_channels] in dtype, or null
  void* y;                  // [batch, out_channels, out_height, out_width], the layout of x
  int64_t batch, channels;  // channels of all groups together
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;
  bool channels_last;
  DType dtype;
  Activation activation;
  int threads;
};

// Channels of y in [to, to + count) are those of x from `from` on, or constants where that is -1.
struct ChannelRun {
  int32_t to, count, from;
};

// Channels of y from those of x, as the bits they are. Both sides are images, either planes [channel][pixel] or rows
// [pixel][channel]; images and rows of y are contiguous.
struct ChannelCopy {
  const void* x;
  int64_t x_channels;  // elements between its rows, or planes of an image
  void* y;
  int64_t y_channels;
  const void* constants;   // [y_channels], or null for zeros
  const ChannelRun* runs;  // that name every channel of y once
  int64_t run_count;
  int64_t images, pixels;
  bool x_planes, y_planes;
  int element_size;  // 2, 4 or 8
  int threads;
};

// CPU. The instruction set is chosen once, at run time, from those that were built and the processor has.
void cpu_nm24_linear(const NM24Linear& op);
void cpu_nm24_conv(const NM24Conv& op);
void cpu_channel_copy(const ChannelCopy& op);
const char* cpu_isa();  // the one in use: "portable", "avx2", "avx512", "avx512_bf16"
bool cpu_built(const char* isa);
bool cpu_supports(const char* isa);  // built, and the processor has it
void cpu_use_isa(const char* isa);   // precondition: cpu_supports(isa)

// CUDA. Functions return null, or a text that lives for the whole process. `stream` is a cudaStream_t.
struct CudaInfo {
  const char* error;  // why no kernel can run here, or null
  int driver, runtime, devices;
};
bool cuda_built();
const char* cuda_archs();  // "80;90a", empty when built without CUDA
CudaInfo cuda_probe();

// A 2:4 weight as the GPU kernels take it: the canonical values, and the metadata in slabs of 128 columns.
struct CudaWeight {
  const void* values;  // [rows, cols/2], beginning at a multiple of 16 bytes
  const void* slabs;   // [ceil(cols/128), slab_rows] slots of 16 bytes (sparseops/formats/nm24_slabs.py draws them)
  int64_t rows;
  int64_t cols;       // packed columns, a multiple of 32
  int64_t slab_rows;  // the rows of each convolution group rounded up to 16, all of them to 128
  // For the tiles that take weights from registers: the values once more, in the order in which instructions want them
  // (sparseops/formats/nm24_fragments.py draws it), for slab_rows rows and whole slabs. Null otherwise.
  const void* fragments;
};

// y[t, m] = act(sum[t, m] * x_scale[t] * w_scale[m] + bias[m] + residual[t, m])
struct CudaEpilogue {
  const void* bias;      // [rows] in dtype, or null
  const void* residual;  // laid out as y, or null
  const float* x_scale;  // [tokens], or null for 1
  const float* w_scale;  // [rows], or null for 1
  DType dtype;           // of bias, residual and y: f32, f16 or bf16
  Activation activation;
};

// The shapes of an output tile, which one block of threads computes. Those of sm90, features by tokens, need a GPU of
// compute capability 9.0; rs: the weight goes from global memory to registers.
enum class TileShape : int {
  few8 = 0,
  few16 = 1,
  small = 2,
  large = 3,
  sm90_128x8 = 4,
  sm90_128x16 = 5,
  sm90_128x32 = 6,
  sm90_128x64 = 7,
  sm90_128x128 = 8,
  sm90_128x256 = 9,
  sm90_256x128 = 10,
  sm90_192x192 = 11,
  sm90_rs_128x256 = 12,
  sm90_rs_256x128 = 13,
};
struct CudaTile {
  const char* name;
  int features, tokens;
  int depth;      // 16-bit columns of one step; a split is made of whole ones
  int consumers;  // parts of the tile that are added up apart from each other where it has splits
  int arch;       // the least compute capability, and for 90 the only one
};

// How a call is cut into blocks, and where it runs.
struct CudaPlan {
  TileShape tile;
  int splits;          // blocks that share the columns of one output tile
  int cluster;         // sm90: 2 for pairs of blocks that share what they read of x, else 1
  int blocks;          // sm90: how many blocks run at a time
  void* partials;      // splits > 1: 4 bytes for each element of each tile and split
  uint32_t* counters;  // splits > 1: one for each consumer of each tile; zero before the launch, zero again after it
  int device;
  void* stream;
};

// x and y begin at multiples of 16 bytes.
struct CudaNM24Linear {
  const void* x;     // [tokens, in_features]; rows begin at, and are, multiples of 16 bytes
  int64_t x_stride;  // elements between tokens
  CudaWeight weight;
  CudaEpilogue epilogue;
  void* y;  // [tokens, rows], contiguous
  int64_t tokens, in_features;
  // of x and values: f16 or bf16, with an epilogue in it or in f32; i8, or e4m3 with tiles of sm90, with any epilogue
  DType dtype;
};

struct CudaNM24Conv {
  const void* x;  // [batch, height, width, channels], contiguous
  CudaWeight weight;
  CudaEpilogue epilogue;
  void* y;                  // [batch, out_height, out_width, rows], contiguous
  int64_t batch, channels;  // channels of all groups; those of one group are a multiple of 4
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;
  DType dtype;  // f16 or bf16
};

const CudaTile* cuda_tiles(int* count);  // by TileShape
const char* cuda_nm24_linear(const CudaNM24Linear& op, const CudaPlan& plan);
const char* cuda_nm24_conv(const CudaNM24Conv& op, const CudaPlan& plan);

// dense [rows, cols] to its values and meta: the two largest magnitudes of each group of four columns
const char* cuda_nm24_compress(const void* dense, void* values, uint8_t* meta, int64_t rows, int64_t cols, DType dtype,
                               int device, void* stream);

// dense[m, k] of `rows` x `cols`; elements of 1, 2 or 4 bytes are copied bit for bit
const char* cuda_nm24_to_dense(const NM24Weight& weight, void* dense, int element_size, int device, void* stream);

// grad_values[m, j] = sum_t grad[t, m] * x[t, k], k the column of value j; zero where k >= in_features
struct CudaNM24GradValues {
  const void* grad;  // [tokens, rows]; rows of 16-byte multiples, as x
  int64_t grad_stride;
  const void* x;  // [tokens, in_features]
  int64_t x_stride;
  const uint8_t* meta;  // canonical
  void* grad_values;    // [rows, cols/2]
  int64_t tokens, rows, in_features, cols;
  DType dtype;  // f16 or bf16
};
const char* cuda_nm24_grad_values(const CudaNM24GradValues& op, int device, void* stream);

}  // namespace sparseops
