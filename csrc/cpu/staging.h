// The input of a convolution, laid out so that every tap of the kernel reads contiguous runs: float planes
// [image][channel][row][phase][index], border included, where column j of the bordered image lies in phase
// j % stride_w at index j / stride_w. Output column `ow` of tap column `s` is then index ow + s*dilation_w / stride_w of
// one phase: consecutive outputs are consecutive floats at any stride.
#pragma once
#include "ops.h"
#include "panel.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

struct Planes {
  int64_t rows, phases, pitch;  // of one plane; pitch: floats of one phase of one row

  explicit Planes(const NM24Conv& op)
      : rows((op.out_height - 1) * op.stride_h + (op.kernel_h - 1) * op.dilation_h + 1),
        phases(op.stride_w),
        pitch(ceil_div((op.out_width - 1) * op.stride_w + (op.kernel_w - 1) * op.dilation_w + 1, op.stride_w)) {
    if (is_input(op)) rows = op.height;
  }

  // True when the input is such planes already.
  bool is_input(const NM24Conv& op) const {
    return op.dtype == DType::f32 && !op.channels_last && phases == 1 && op.pad_top == 0 && op.pad_left == 0 &&
           rows <= op.height && pitch == op.width;
  }

  int64_t floats() const { return rows * phases * pitch; }
  int64_t row(int64_t row) const { return row * phases * pitch; }
  int64_t column(int64_t j) const { return j % phases * pitch + j / phases; }
  int64_t columns() const { return phases * pitch; }
};

inline const float* widened(const float* in, int64_t, float*) { return in; }
template <class T>
const float* widened(const T* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
  return out;
}

// Puts input columns [column, column + count) of one row where they belong; columns outside the plane are dropped.
inline void put_columns(const Planes& planes, float* row, int64_t column, const float* in, int64_t count) {
  const int64_t skipped = max(0, -column), end = min(column + count, planes.columns());
  if (planes.phases == 1) {
    if (column + skipped < end) std::memcpy(row + column + skipped, in + skipped, size_t(end - column - skipped) * 4);
    return;
  }
  for (int64_t j = column + skipped; j < end; ++j) row[planes.column(j)] = in[j - column];
}

// Planes of `channels` channels from `channel` on, of one image.
template <class T>
void stage_contiguous(const NM24Conv& op, const Planes& planes, const T* image, int64_t channel, int64_t channels,
                      float* out) {
  constexpr int64_t kPiece = 256;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t row = 0; row < planes.rows; ++row) {
      const int64_t y = row - op.pad_top;
      if (y < 0 || y >= op.height) continue;
      const T* in = image + ((channel + c) * op.height + y) * op.width;
      float* to = out + c * planes.floats() + planes.row(row);
      for (int64_t x = 0; x < op.width; x += kPiece) {
        float piece[kPiece];
        const int64_t count = min(kPiece, op.width - x);
        put_columns(planes, to, op.pad_left + x, widened(in + x, count, piece), count);
      }
    }
}

template <class T>
void stage_channels_last(const NM24Conv& op, const Planes& planes, const T* image, int64_t channel, int64_t channels,
                         float* out) {
  for (int64_t row = 0; row < planes.rows; ++row) {
    const int64_t y = row - op.pad_top;
    if (y < 0 || y >= op.height) continue;
    for (int64_t x = 0; x < op.width; x += kLanes) {
      const int64_t count = min(kLanes, op.width - x);
      const bool whole = planes.phases == 1 && count == kLanes && op.pad_left + x + kLanes <= planes.pitch;
      const T* pixels[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        pixels[lane] = image + (y * op.width + x + min(lane, count - 1)) * op.channels + channel;
      float* to = out + planes.row(row);
      int64_t c = 0;
      for (; c + 4 <= channels; c += 4) {
        Vec columns[4];
        load_columns(pixels, c, columns);
        for (int i = 0; i < 4; ++i) {
          float* at = to + (c + i) * planes.floats();
          if (whole) {
            store(at + op.pad_left + x, columns[i]);
          } else {
            float piece[kLanes];
            store(piece, columns[i]);
            put_columns(planes, at, op.pad_left + x, piece, count);
          }
        }
      }
      for (; c < channels; ++c)
        for (int64_t lane = 0; lane < count; ++lane) {
          const float value = to_float(pixels[lane][c]);
          put_columns(planes, to + c * planes.floats(), op.pad_left + x + lane, &value, 1);
        }
    }
  }
}

template <class T>
void stage(const NM24Conv& op, const Planes& planes, float* out) {
  const int64_t kChannels = 64 / int64_t(sizeof(T));  // a cache line of channels_last input
  const int64_t blocks = ceil_div(op.channels, kChannels);
  const int64_t outputs = op.batch * op.out_height * op.out_width * op.weight.rows;
  const int threads = worthwhile_threads(op.threads, outputs * op.weight.cols);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < op.batch * blocks; ++task) {
    const int64_t image = task / blocks, channel = task % blocks * kChannels;
    const int64_t channels = min(kChannels, op.channels - channel);
    const T* in = static_cast<const T*>(op.x) + image * op.channels * op.height * op.width;
    float* to = out + (image * op.channels + channel) * planes.floats();
    std::memset(to, 0, size_t(channels * planes.floats()) * 4);
    if (op.channels_last) {
      stage_channels_last(op, planes, in, channel, channels, to);
    } else {
      stage_contiguous(op, planes, in, channel, channels, to);
    }
  }
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
