// isa: portable avx2 avx512 avx512_bf16
// Copies the kept channels out of a tensor, or puts them among constants, as the bits they are. Where both sides are
// rows of channels, or both planes of pixels, runs of channels are copied; between rows and planes blocks of elements
// are transposed in registers. Bound by memory: every element is read once and written once.
#include "kernels.h"
#include "panel.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

constexpr int64_t kBytesPerThread = 1 << 17;  // copied in about 10 us
constexpr int64_t kPixelsPerTask = 64;

// Tile<T>::run(rows, index, out): out[i][row] = rows[row][index + i] for kRows rows and kAlong values of i.
template <class T>
struct Tile {
  static constexpr int kRows = 8, kAlong = 8;
  static void run(const T* const* rows, int64_t index, T* const* out) {
    for (int i = 0; i < kAlong; ++i)
      for (int row = 0; row < kRows; ++row) out[i][row] = rows[row][index + i];
  }
};

template <>
struct Tile<float> {
  static constexpr int kRows = kLanes, kAlong = 4;
  static void run(const float* const* rows, int64_t index, float* const* out) {
    Vec columns[kAlong];
    load_columns(rows, index, columns);
    for (int i = 0; i < kAlong; ++i) store(out[i], columns[i]);
  }
};

#if defined(SPARSEOPS_WORD_TRANSPOSE)
template <>
inline void Tile<uint16_t>::run(const uint16_t* const* rows, int64_t index, uint16_t* const* out) {
  transpose_words(rows, index, out);
}
#endif

// out(i)[line] = line(line)[i] for i in [begin, end) of lines of `along` elements. A tile at an edge overlaps the one
// before it, and where there are fewer lines than it has, its last line is repeated and dropped again.
template <class T, class Line, class Out>
void transpose(const Line& line, int64_t lines, int64_t begin, int64_t end, int64_t along, const Out& out) {
  constexpr int kRows = Tile<T>::kRows, kAlong = Tile<T>::kAlong;
  for (int64_t l = 0; l < lines; l += kRows) {
    const int64_t first = max(0, min(l, lines - kRows)), count = min(kRows, lines);
    const T* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = line(first + min(r, count - 1));
    if (along < kAlong) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t r = 0; r < count; ++r) out(i)[first + r] = rows[r][i];
      continue;
    }
    for (int64_t i = begin; i < end; i += kAlong) {
      const int64_t at = min(i, along - kAlong);
      T piece[kAlong][kRows];
      T* to[kAlong];
      for (int j = 0; j < kAlong; ++j) to[j] = count == kRows ? out(at + j) + first : piece[j];
      Tile<T>::run(rows, at, to);
      for (int j = 0; j < kAlong && count < kRows; ++j) std::memcpy(out(at + j), piece[j], size_t(count) * sizeof(T));
    }
  }
}

// `count` pieces of so many bytes, which lie so far apart on either side.
template <int kBytes>
void copy_pieces(const char* in, int64_t in_stride, int64_t bytes, int64_t count, char* out, int64_t out_stride) {
  for (int64_t p = 0; p < count; ++p, in += in_stride, out += out_stride) {
    int64_t i = 0;
    for (; i + kBytes <= bytes; i += kBytes) std::memcpy(out + i, in + i, kBytes);
    if (i < bytes) std::memcpy(out + bytes - kBytes, in + bytes - kBytes, kBytes);
  }
}

inline void copy_run(const char* in, int64_t in_stride, int64_t bytes, int64_t count, char* out, int64_t out_stride) {
  if (bytes == 32) {  // a block of 8 channels of 4 bytes, or of 16 of 2
    for (int64_t p = 0; p < count; ++p) std::memcpy(out + p * out_stride, in + p * in_stride, 32);
  } else if (bytes >= 32) {
    copy_pieces<32>(in, in_stride, bytes, count, out, out_stride);
  } else if (bytes >= 8) {
    copy_pieces<8>(in, in_stride, bytes, count, out, out_stride);
  } else {
    copy_pieces<2>(in, in_stride, bytes, count, out, out_stride);
  }
}

// A copy, typed. Constants are what x is where a run has none; without constants they are zero.
template <class T>
struct Channels {
  const ChannelCopy& op;
  const T* x;
  T* y;
  const T* constants;

  explicit Channels(const ChannelCopy& op)
      : op(op), x(static_cast<const T*>(op.x)), y(static_cast<T*>(op.y)), constants(static_cast<const T*>(op.constants)) {}

  T constant(int64_t channel) const { return constants ? constants[channel] : T(0); }

  template <class Each>
  void constant_runs(const Each& each) const {
    for (int64_t i = 0; i < op.run_count; ++i)
      if (op.runs[i].from < 0) each(op.runs[i]);
  }

  // Rows of channels to rows of channels. A run at a time for a few pixels, whose lines stay near meanwhile.
  void rows_to_rows(int64_t begin, int64_t end) const {
    constexpr int64_t kPixels = 8;
    for (int64_t first = begin; first < end; first += kPixels) {
      const int64_t count = min(kPixels, end - first);
      for (int64_t i = 0; i < op.run_count; ++i) {
        const ChannelRun& run = op.runs[i];
        const int64_t bytes = run.count * int64_t(sizeof(T));
        char* out = reinterpret_cast<char*>(y + first * op.y_channels + run.to);
        const int64_t out_stride = op.y_channels * int64_t(sizeof(T));
        if (run.from < 0 && !constants) {
          for (int64_t p = 0; p < count; ++p) std::memset(out + p * out_stride, 0, size_t(bytes));
          continue;
        }
        const T* source = run.from < 0 ? constants + run.to : x + first * op.x_channels + run.from;
        const int64_t in_stride = run.from < 0 ? 0 : op.x_channels * int64_t(sizeof(T));
        const char* in = reinterpret_cast<const char*>(source);
        copy_run(in, in_stride, bytes, count, out, out_stride);
      }
    }
  }

  // Whole planes.
  void planes_to_planes(int64_t image) const {
    for (int64_t i = 0; i < op.run_count; ++i) {
      const ChannelRun& run = op.runs[i];
      T* out = y + (image * op.y_channels + run.to) * op.pixels;
      if (run.from >= 0) {
        const T* in = x + (image * op.x_channels + run.from) * op.pixels;
        std::memcpy(out, in, size_t(run.count * op.pixels) * sizeof(T));
        continue;
      }
      for (int64_t c = 0; c < run.count; ++c) fill(out + c * op.pixels, op.pixels, constant(run.to + c));
    }
  }

  // Pixels [begin, end) of planes to rows; `from` names the plane of each channel of y, or -1.
  void planes_to_rows(const int32_t* from, int64_t image, int64_t begin, int64_t end) const {
    const T* planes = x + image * op.x_channels * op.pixels + begin;
    T* rows = y + (image * op.pixels + begin) * op.y_channels;
    const auto line = [&](int64_t channel) { return planes + max(0, from[channel]) * op.pixels; };
    const auto out = [&](int64_t pixel) { return rows + pixel * op.y_channels; };
    transpose<T>(line, op.y_channels, 0, end - begin, end - begin, out);
    constant_runs([&](const ChannelRun& run) {
      for (int64_t pixel = 0; pixel < end - begin; ++pixel)
        for (int64_t c = run.to; c < run.to + run.count; ++c) out(pixel)[c] = constant(c);
    });
  }

  // Pixels [begin, end) of rows to planes; `to` names the plane of each channel of x, or -1.
  void rows_to_planes(const int32_t* to, int64_t image, int64_t begin, int64_t end) const {
    constexpr int64_t kChannels = 16;
    const T* rows = x + (image * op.pixels + begin) * op.x_channels;
    T* planes = y + image * op.y_channels * op.pixels + begin;
    T dropped[kPixelsPerTask];
    const auto out = [&](int64_t channel) { return to[channel] < 0 ? dropped : planes + to[channel] * op.pixels; };
    for (int64_t c = 0; c < op.x_channels; c += kChannels) {
      const auto line = [&](int64_t pixel) {
        __builtin_prefetch(rows + pixel * op.x_channels + c + kChannels);  // comes by while this line is written
        return rows + pixel * op.x_channels;
      };
      transpose<T>(line, end - begin, c, min(c + kChannels, op.x_channels), op.x_channels, out);
    }
    constant_runs([&](const ChannelRun& run) {
      for (int64_t c = run.to; c < run.to + run.count; ++c) fill(planes + c * op.pixels, end - begin, constant(c));
    });
  }

  static void fill(T* out, int64_t count, T value) {
    for (int64_t i = 0; i < count; ++i) out[i] = value;
  }
};

// For each channel of y the one of x it comes from, or for each of x the one of y it goes to; -1 where there is none.
inline void list_channels(const ChannelCopy& op, int32_t* list) {
  const int64_t count = op.x_planes ? op.y_channels : op.x_channels;
  for (int64_t i = 0; i < count; ++i) list[i] = -1;
  for (int64_t i = 0; i < op.run_count; ++i) {
    const ChannelRun& run = op.runs[i];
    for (int32_t c = 0; c < run.count && run.from >= 0; ++c) {
      if (op.x_planes) {
        list[run.to + c] = run.from + c;
      } else {
        list[run.from + c] = run.to + c;
      }
    }
  }
}

template <class T>
void copy_channels(const ChannelCopy& op) {
  const Channels<T> channels(op);
  const bool transposes = op.x_planes != op.y_planes && op.pixels > 1;
  const int64_t bytes = op.images * op.pixels * op.y_channels * int64_t(sizeof(T));
  const int threads = int(min(op.threads, max(1, bytes / kBytesPerThread)));
  if (op.x_planes && op.y_planes) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t image = 0; image < op.images; ++image) channels.planes_to_planes(image);
    return;
  }
  // Rows of all images follow one another; planes end with their image.
  const int64_t images = transposes ? op.images : 1, pixels = op.images * op.pixels / images;
  const int64_t blocks = max(ceil_div(pixels, kPixelsPerTask), min(threads, ceil_div(pixels, 16)));
  const Scratch scratch(transposes ? op.x_planes ? op.y_channels : op.x_channels : 0);
  int32_t* list = reinterpret_cast<int32_t*>(scratch.data());
  if (transposes) list_channels(op, list);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < images * blocks; ++task) {
    const int64_t image = task / blocks, block = task % blocks;
    const int64_t begin = block * pixels / blocks, end = (block + 1) * pixels / blocks;
    if (!transposes) {
      channels.rows_to_rows(begin, end);
    } else if (op.x_planes) {
      channels.planes_to_rows(list, image, begin, end);
    } else {
      channels.rows_to_planes(list, image, begin, end);
    }
  }
}

void channel_copy(const ChannelCopy& op) {
  switch (op.element_size) {
    case 2:
      return copy_channels<uint16_t>(op);
    case 4:
      return copy_channels<float>(op);
    case 8:
      return copy_channels<uint64_t>(op);
  }
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
