// isa: portable avx2 avx512 avx512_bf16
// 2-D convolution with a 2:4 weight as an implicit matrix product: positions of the panel are pixels of the output, all
// images one after the other, and its columns are (tap row, tap column, channel). The input is staged once with its
// border (staging.h), so that a column of the panel is a few copies of contiguous runs.
#include "epilogue.h"
#include "kernels.h"
#include "panel.h"
#include "staging.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

// Consecutive outputs that are consecutive floats of the staged planes.
struct Run {
  int64_t offset;  // of tap (0, 0) in channel 0, from the start of the planes
  int64_t length;
};

struct Runs {
  Run run[kMaxPositions];
  int count = 0;

  Runs(const NM24Conv& op, const Planes& planes, const Span& span) {
    int64_t image_size = op.out_height * op.out_width, row_size = op.out_width;
    const bool whole_rows = planes.row(op.stride_h) == op.out_width;
    if (whole_rows) row_size = image_size;  // a 1x1 kernel at stride 1: rows follow each other without a gap
    int64_t position = span.first, left = span.positions;
    while (left > 0) {
      const int64_t image = position / image_size, in_image = position % image_size;
      const int64_t row = in_image / row_size, column = in_image % row_size;
      const int64_t length = min(left, row_size - column);
      run[count++] = {image * op.channels * planes.floats() + planes.row(row * op.stride_h) + column, length};
      position += length;
      left -= length;
    }
  }
};

inline void copy_run(const float* in, int64_t length, float* out) {
  if (length >= kLanes) {
    for (int64_t i = 0; i + kLanes <= length; i += kLanes) store(out + i, load(in + i));
    store(out + length - kLanes, load(in + length - kLanes));
  } else if (length >= 4) {
    for (int64_t i = 0; i + 4 <= length; i += 4) store_quad(out + i, load_quad(in + i));
    store_quad(out + length - 4, load_quad(in + length - 4));
  } else {
    for (int64_t i = 0; i < length; ++i) out[i] = in[i];
  }
}

// panel[column][position]; `planes` points at channel 0 of this group in image 0.
inline void pack_pixels(const NM24Conv& op, const Planes& layout, const float* planes, float* panel, const Span& span,
                        int64_t column, int64_t columns) {
  const Runs runs(op, layout, span);
  const int64_t taps = op.kernel_h * op.kernel_w, channels = op.channels / op.groups,
                tap_columns = round_up(channels, 4);
  const int64_t pitch = span.vectors * kLanes;
  const float* const end = panel + columns * pitch;
  for (int64_t tap = column / tap_columns, channel = column % tap_columns; panel < end; ++tap, channel = 0) {
    const int64_t r = tap / op.kernel_w, s = tap % op.kernel_w;
    const float* in =
        planes + channel * layout.floats() + layout.row(r * op.dilation_h) + layout.column(s * op.dilation_w);
    for (; channel < tap_columns && panel < end; ++channel, in += layout.floats(), panel += pitch) {
      int64_t position = 0;
      if (tap < taps && channel < channels) {
        for (int i = 0; i < runs.count; ++i) {
          copy_run(in + runs.run[i].offset, runs.run[i].length, panel + position);
          position += runs.run[i].length;
        }
      }
      for (; position < pitch; ++position) panel[position] = 0.0f;
    }
  }
}

// y[image][row][pixel] for channels in planes, y[image][pixel][row] for channels last.
template <class T>
void store_pixels(const NM24Conv& op, const float* sums, const Span& span, int64_t row, int64_t rows) {
  const int64_t pitch = span.vectors * kLanes, out_channels = op.weight.rows, pixels = op.out_height * op.out_width;
  T* y = static_cast<T*>(op.y);
  if (op.channels_last)
    return store_transposed(sums, rows, pitch, span.positions, y + span.first * out_channels + row, out_channels);
  for (int64_t done = 0; done < span.positions;) {
    const int64_t image = (span.first + done) / pixels, pixel = (span.first + done) % pixels;
    const int64_t count = min(span.positions - done, pixels - pixel);
    for (int64_t i = 0; i < rows; ++i)
      copy_row(sums + i * pitch + done, count, y + (image * out_channels + row + i) * pixels + pixel);
    done += count;
  }
}

template <class T>
void convolve(const NM24Conv& op) {
  const Planes layout(op);
  const bool staged = layout.is_input(op);
  const Scratch scratch(staged ? 0 : op.batch * op.channels * layout.floats());
  if (!staged) stage<T>(op, layout, scratch.data());
  const float* planes = staged ? static_cast<const float*>(op.x) : scratch.data();

  const int64_t group_rows = op.weight.rows / op.groups, group_channels = op.channels / op.groups;
  for (int64_t group = 0; group < op.groups; ++group) {
    const Block<T> w = block_of<T>(op.weight).from_row(group * group_rows, group_rows);
    const float* input = planes + group * group_channels * layout.floats();
    const auto pack = [&](float* panel, const Span& span, int64_t column, int64_t columns) {
      pack_pixels(op, layout, input, panel, span, column, columns);
    };
    const auto finish = [&](float* sums, const Span& span, int64_t row, int64_t rows) {
      row += group * group_rows;
      const T* bias = op.bias ? static_cast<const T*>(op.bias) + row : nullptr;
      add_bias_and_activate(sums, rows, span.vectors, bias, op.activation);
      store_pixels<T>(op, sums, span, row, rows);
    };
    multiply_tiles(w, op.batch * op.out_height * op.out_width, op.threads, pack, finish);
  }
}

// A 1x1 kernel over pixels whose channels lie together is the linear layer.
bool is_linear(const NM24Conv& op) {
  return (op.channels_last || op.height * op.width == 1) && op.groups == 1 && op.kernel_h * op.kernel_w == 1 &&
         op.out_height == op.height && op.out_width == op.width && op.stride_h == 1 && op.stride_w == 1 &&
         op.pad_top == 0 && op.pad_left == 0;
}

void nm24_conv(const NM24Conv& op) {
  if (is_linear(op)) {
    return nm24_linear({op.x, op.channels, op.weight, op.bias, op.y, op.batch * op.height * op.width, op.channels,
                        op.dtype, op.activation, op.threads});
  }
  switch (op.dtype) {
    case DType::f32:
      return convolve<float>(op);
    case DType::f16:
      return convolve<Half>(op);
    case DType::bf16:
      return convolve<BFloat16>(op);
  }
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
