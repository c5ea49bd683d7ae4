// nm24_linear through its host code, against float64: what the tests of its kernels share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "ops.h"
#include "test_support.h"

namespace sparseops {

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::f32;
  if constexpr (std::is_same_v<T, __half>) return DType::f16;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return DType::bf16;
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) return DType::e4m3;
  return DType::i8;
}

struct Shape {
  int rows, tokens, in_features;
};

struct Options {
  TileShape tile = TileShape::small;
  int splits = 1;
  Activation activation = Activation::none;
  bool bias = true, residual = false, scales = false;
  int gap = 0;               // elements between rows of x
  int misaligned_bias = 0;   // elements
  bool tight_slabs = false;  // that end with the last 16 rows
  int cluster = 1, blocks = 2;
};

double activated(double z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return std::max(z, 0.0);
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::gelu:
      return z * (1 + std::erf(z * std::sqrt(0.5))) / 2;
    default:
      return z;
  }
}

// The values in the order of csrc/ops.h's fragments: slabs of 128 columns, 16 rows, steps of 32 columns, lanes 4g + t, the
// four registers of a lane, each with two neighbours of row g + 8 (r % 2) in the (r / 2)-th half of the step.
template <class T>
emu::Buffer<T> in_fragments(const emu::Weight<T>& w, int64_t slots) {
  const int64_t slabs = (w.cols + 127) / 128;
  emu::Buffer<T> fragments(slabs * slots * 64, T(0.f));
  for (int64_t m = 0; m < w.rows; ++m) {
    for (int64_t j = 0; j < w.cols / 2; ++j) {
      const int64_t slab = j / 64, step = j / 16 % 4, half = j / 8 % 2, t = j / 2 % 4, of_two = j % 2;
      const int64_t lane = m % 8 * 4 + t, r = m / 8 % 2 + 2 * half;
      fragments[((((slab * (slots / 16) + m / 16) * 4 + step) * 32 + lane) * 4 + r) * 2 + of_two] =
          w.values[m * (w.cols / 2) + j];
    }
  }
  return fragments;
}

template <class T, class out_t>
void linear(const Shape& shape, const Options& options) {
  const int64_t rows = shape.rows, tokens = shape.tokens, columns = shape.in_features;
  const int64_t stride = columns + options.gap, cols = (columns + 31) / 32 * 32;
  emu::Random random(rows * 1000003 + tokens * 1009 + columns);
  const emu::Weight<T> w(rows, cols, random);
  emu::Buffer<T> x(tokens ? (tokens - 1) * stride + columns : 0);  // NaN in the gaps
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < columns; ++k) x[t * stride + k] = random.number<T>();
  const emu::Buffer<out_t> bias = random.normal<out_t>(rows + options.misaligned_bias);
  const emu::Buffer<out_t> residual = random.normal<out_t>(rows * tokens);
  emu::Buffer<float> x_scale(tokens), w_scale(rows);
  for (int64_t t = 0; t < tokens; ++t) x_scale[t] = 0.001f * static_cast<float>(1 + random.below(100));
  for (int64_t m = 0; m < rows; ++m) w_scale[m] = 0.001f * static_cast<float>(1 + random.below(100));
  emu::Buffer<out_t> y(rows * tokens);

  int count = 0;
  const CudaTile& tile = cuda_tiles(&count)[static_cast<int>(options.tile)];
  const int64_t tiles = (rows + tile.features - 1) / tile.features * ((tokens + tile.tokens - 1) / tile.tokens);
  const bool split = options.splits > 1;
  emu::Buffer<float> partials(split ? tiles * options.splits * tile.features * tile.tokens : 0);
  emu::Buffer<uint32_t> counters(split ? tiles * tile.consumers : 0);
  counters.fill(0);

  const out_t* first_bias = bias.data() + options.misaligned_bias;
  const CudaEpilogue epilogue{options.bias ? first_bias : nullptr,
                              options.residual ? residual.data() : nullptr,
                              options.scales ? x_scale.data() : nullptr,
                              options.scales ? w_scale.data() : nullptr,
                              dtype_of<out_t>(),
                              options.activation};
  const int64_t slots = options.tight_slabs ? (rows + 15) / 16 * 16 : w.slab_rows, slabs = (cols + 127) / 128;
  emu::Buffer<uint8_t> slab_bytes(slabs * slots * 16);
  for (int64_t slab = 0; slab < slabs; ++slab)
    std::memcpy(slab_bytes.data() + slab * slots * 16, w.slabs.data() + slab * w.slab_rows * 16, slots * 16);
  const bool from_registers = options.tile >= TileShape::sm90_rs_128x256;
  const emu::Buffer<T> fragments = from_registers ? in_fragments(w, slots) : emu::Buffer<T>(0);
  const CudaWeight weight{w.values.data(), slab_bytes.data(), rows, cols, slots, fragments.data()};
  const CudaPlan plan{
      options.tile, options.splits, options.cluster, options.blocks, partials.data(), counters.data(), 0, nullptr};
  emu::require(cuda_nm24_linear({x.data(), stride, weight, epilogue, y.data(), tokens, columns, dtype_of<T>()}, plan));

  std::vector<double> expected(rows * tokens), size(rows * tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t m = 0; m < rows; ++m) {
      double sum = 0, terms = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const double term = emu::to_double(x[t * stride + k]) * w.dense[m * cols + k];
        sum += term;
        terms += std::fabs(term);
      }
      const double scale = options.scales ? double(x_scale[t]) * w_scale[m] : 1;
      double z = sum * scale;
      if (options.bias) z += emu::to_double(first_bias[m]);
      if (options.residual) z += emu::to_double(residual[t * rows + m]);
      expected[t * rows + m] = activated(z, options.activation);
      size[t * rows + m] = terms * scale + std::fabs(z) + 4;
    }
  }
  emu::expect_close(y, expected, size);
  if (split) emu::expect_all_splits_busy(partials, tiles, options.splits, slabs);
  for (std::size_t i = 0; i < counters.size(); ++i)
    if (counters[i] != 0) throw emu::Error("a counter is not zero after the launch");
}

}  // namespace sparseops
