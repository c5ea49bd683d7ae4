// What happens to the sums of a tile: bias, activation, rounding to the output's type, and the way to memory.
#pragma once
#include "ops.h"
#include "vector.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

inline Vec float_of(Indices bits) { return reinterpret_cast<Vec>(bits); }

// e^x to 2 units in the last place: x = n ln 2 + r, 2^n by its exponent in two steps so that both ends of the range come
// out right. The polynomial is a Chebyshev fit of e^r on |r| <= ln(2)/2, relative error 1.8e-8.
inline Vec exp(Vec x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x > 89.0f ? Vec{} + 89.0f : x;
  x = x < -104.0f ? Vec{} - 104.0f : x;
  const Vec shifted = x * 1.44269504f + kRounder, n = shifted - kRounder;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 0.00138294086f;
  p = p * r + 0.00837477976f;
  p = p * r + 0.0416683587f;
  p = p * r + 0.166664207f;
  p = p * r + 0.499999915f;
  p = p * r + 1.00000004f;
  p = p * r + 1.0f;
  const Indices exponent = reinterpret_cast<Indices>(shifted) - 0x4b400000, half = exponent >> 1;
  return p * float_of((half + 127) << 23) * float_of((exponent - half + 127) << 23);
}

// The complementary error function for x >= 0: e^(-x^2) times a Chebyshev fit in t = 1 / (1 + x/2) of erfc(x) e^(x^2),
// relative error 5e-8 up to x = 10, where the result is no longer a normal float.
inline Vec erfc_of_magnitude(Vec x) {
  const Vec t = 1.0f / (1.0f + 0.5f * x);
  Vec p = Vec{} + -0.0559511334f;
  p = p * t + 0.268459411f;
  p = p * t + -0.451375675f;
  p = p * t + 0.233258049f;
  p = p * t + 0.0080110474f;
  p = p * t + 0.18558856f;
  p = p * t + 0.248475404f;
  p = p * t + 0.281342946f;
  p = p * t + 0.282196283f;
  p = p * t + -4.92599427e-06f;
  return p * exp(-(x * x));
}

inline Vec activate(Vec x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0.0f ? Vec{} : x;  // a NaN stays
    case Activation::silu:
      return x / (1.0f + exp(-x));
    case Activation::gelu: {
      const Vec magnitude = x < 0.0f ? -x : x, tail = 0.5f * erfc_of_magnitude(magnitude * 0.707106781f);
      return x * (x < 0.0f ? tail : 1.0f - tail);
    }
  }
  return x;
}

// In place, sums[row][vectors * kLanes]; bias of these rows, or null.
template <class T>
void add_bias_and_activate(float* sums, int64_t rows, int vectors, const T* bias, Activation activation) {
  if (!bias && activation == Activation::none) return;
  for (int64_t row = 0; row < rows; ++row) {
    const float b = bias ? to_float(bias[row]) : 0.0f;
    for (int v = 0; v < vectors; ++v, sums += kLanes) store(sums, activate(load(sums) + b, activation));
  }
}

// out[i] = in[i], rounded to T.
template <class T>
void copy_row(const float* in, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) from_float(in[i], out + i);
}
inline void copy_row(const float* in, int64_t count, float* out) { std::memcpy(out, in, size_t(count) * 4); }

// out[position * stride + row] = sums[row * pitch + position], rounded to T. A few positions at a time, so that their
// cache lines of the output are filled while they are near even where `stride` maps all of them to one set.
template <class T>
void store_transposed(const float* sums, int64_t rows, int64_t pitch, int64_t positions, T* out, int64_t stride) {
  for (int64_t position = 0; position < positions; position += kLanes, sums += kLanes, out += kLanes * stride) {
    const int64_t count = min(kLanes, positions - position);
    int64_t row = 0;
    for (; count == kLanes && row + 4 <= rows; row += 4) {
      const float* in = sums + row * pitch;
      Vec q[4] = {load(in), load(in + pitch), load(in + 2 * pitch), load(in + 3 * pitch)};
      transpose_quads(q[0], q[1], q[2], q[3]);
      for (int i = 0; i < 4; ++i)
        split_quads(q[i], [&](int quad, Quad rows_of_position) {
          store_quad(out + (4 * quad + i) * stride + row, rows_of_position);
        });
    }
    for (; row < rows; ++row)
      for (int64_t i = 0; i < count; ++i) from_float(sums[row * pitch + i], out + i * stride + row);
  }
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
