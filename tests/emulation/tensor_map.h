// Tensor maps, as the driver's calls (driver_emulation.cpp) make them here, and the walk through what a copy by one
// moves: PTX ISA 5.5.
#pragma once
#include <cuda.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace sparseops_emulation {

// Where the copy engine and the tensor cores have the byte of address `a` if 16-byte chunks are exchanged within `span`
// bytes: by a pattern of the address itself. PTX ISA 5.5.7.
inline std::uint32_t exchange(std::uint32_t a, std::uint32_t span) {
  return span ? a ^ (a >> 7 & (span / 16 - 1)) << 4 : a;
}

// Part of a row of the box in shared memory: its bytes `first` to `first + bytes - 1` lie at `global`, the others
// outside the tensor.
struct BoxRow {
  std::uint32_t index;
  std::uint32_t first, bytes;
  std::byte* global;
};

// What is kept in a map's opaque 128 bytes. Dimension 0 is the innermost, and has no stride of its own.
struct TensorMap {
  static constexpr int kMaxRank = 5;
  static constexpr std::uint32_t kMark = 0x70616d74;  // tells a map from bytes that are none
  enum class Mode : std::uint8_t { tile, im2col };

  std::uint32_t mark = kMark;
  Mode mode = Mode::tile;
  std::uint8_t rank = 0;
  std::uint8_t element = 0;  // its bytes
  std::uint8_t span = 0;     // 32, 64 or 128 bytes whose 16-byte chunks are exchanged, or 0
  std::byte* base = nullptr;
  std::uint64_t size[kMaxRank] = {}, stride[kMaxRank] = {};  // elements, bytes
  std::uint16_t box[kMaxRank] = {};                          // im2col: channels of a pixel, pixels
  std::int16_t lower[3] = {}, upper[3] = {};                 // im2col: the corners along w, h, d
  std::uint8_t step[kMaxRank] = {1, 1, 1, 1, 1};

  std::uint32_t row_bytes() const { return std::uint32_t{box[0]} * element; }
  std::uint32_t rows() const {
    if (mode == Mode::im2col) return box[1];
    std::uint32_t rows = 1;
    for (int d = 1; d < rank; ++d) rows *= count(d);
    return rows;
  }
  std::uint32_t bytes() const { return rows() * row_bytes(); }

  // How many elements of dimension d a box has: every step-th of its extent.
  std::uint32_t count(int d) const { return (box[d] + step[d] - 1u) / step[d]; }

  // Where in shared memory byte `byte` of row `row` goes, if the box begins at `start`. A row that is exchanged in
  // itself is as long as the span.
  std::uint32_t address(std::uint32_t start, std::uint32_t row, std::uint32_t byte) const {
    return exchange(start + row * row_bytes() + byte, span);
  }
  // What `start` must be a multiple of: for an exchange, where its pattern begins.
  std::uint32_t alignment() const { return std::max(128, 8 * span); }

  // Calls f(BoxRow) for each row of the box at `at`, in the order of shared memory.
  template <class F>
  void for_each_row(const int* at, F f) const {
    std::uint32_t i[kMaxRank] = {};
    for (std::uint32_t row = 0; row < rows(); ++row) {
      std::int64_t c[kMaxRank] = {at[0]};
      for (int d = 1; d < rank; ++d) c[d] = std::int64_t{at[d]} + std::int64_t{i[d]} * step[d];
      f(part_inside(row, c));
      for (int d = 1; d < rank && ++i[d] == count(d); ++d) i[d] = 0;
    }
  }

  // The same for the pixels of an NHWC tensor: from the one at `at` = {c, w, h, n} on along w, then h, then n, within
  // the corners; each is moved by the offsets, after which it may lie outside the tensor.
  template <class F>
  void for_each_pixel(const int (&at)[4], int offset_w, int offset_h, F f) const {
    std::int64_t w = at[1], h = at[2], n = at[3];
    for (std::uint32_t row = 0; row < rows(); ++row) {
      const std::int64_t c[kMaxRank] = {at[0], w + offset_w, h + offset_h, n};
      f(part_inside(row, c));
      if ((w += step[1]) < end(0)) continue;
      w = lower[0];
      if ((h += step[2]) < end(1)) continue;
      h = lower[1];
      ++n;
    }
  }
  // Where a walk along w (0) or h (1) turns back to the lower corner.
  std::int64_t end(int spatial) const { return std::int64_t(size[spatial + 1]) + upper[spatial]; }

 private:
  BoxRow part_inside(std::uint32_t row, const std::int64_t (&c)[kMaxRank]) const {
    std::int64_t offset = 0;
    for (int d = 1; d < rank; ++d) {
      if (c[d] < 0 || c[d] >= std::int64_t(size[d])) return {row, 0, 0, nullptr};
      offset += c[d] * std::int64_t(stride[d]);
    }
    const std::int64_t from = std::max(c[0], std::int64_t{0});
    const std::int64_t to = std::min(c[0] + box[0], std::int64_t(size[0]));
    if (from >= to) return {row, 0, 0, nullptr};
    return {row, std::uint32_t(from - c[0]) * element, std::uint32_t(to - from) * element,
            base + offset + from * element};
  }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

}  // namespace sparseops_emulation
