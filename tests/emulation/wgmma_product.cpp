// See wgmma_product.h. Lanes are numbered as in the PTX manual: lane = 4g + t.
#include "wgmma_product.h"

#include <cstring>

#include "block.h"
#include "number_formats.h"
#include "shared_memory.h"
#include "tensor_map.h"

namespace sparseops_emulation {

// ---- operands in shared memory

SharedOperand::SharedOperand(std::uint64_t bits, int rows, int bytes, const char* name) {
  Block& b = block();
  const auto field = [&](int first, int count) { return std::uint32_t(bits >> first & ((1u << count) - 1)); };
  start_ = field(0, 14) << 4;
  leading_ = field(16, 14) << 4;
  stride_ = field(32, 14) << 4;
  constexpr std::uint32_t kSpans[] = {0, 128, 64, 32};
  span_ = kSpans[field(62, 2)];
  if (field(14, 2) || field(30, 2) || field(46, 3) || field(52, 10))
    b.fail("wgmma: the descriptor of %s, 0x%016llx, has bits that mean nothing", name,
           static_cast<unsigned long long>(bits));
  if (field(49, 3)) b.fail("wgmma: the descriptor of %s has a base offset, which is not emulated", name);
  if (span_) {
    const std::uint32_t pattern = 8 * span_, within_row = start_ % span_;
    if (start_ % pattern >= span_)
      b.fail("wgmma: %s begins at 0x%x, %u bytes behind where the exchange of %u bytes begins", name, start_,
             start_ % pattern, span_);
    if (within_row + bytes > span_)
      b.fail("wgmma: %d bytes from byte %u of a row of %s are more than its %u: not emulated", bytes, within_row, name,
             span_);
    if (stride_ % pattern)
      b.fail("wgmma: eight rows of %s are %u bytes, no multiple of %u: not emulated", name, stride_, pattern);
  }
  std::uint32_t most = 0;
  least_ = ~0u;
  for (int row = 0; row < rows; ++row) {
    for (int byte = 0; byte < bytes; byte += 16) {
      least_ = std::min(least_, address(row, byte));
      most = std::max(most, address(row, byte));
    }
  }
  origin_ = shared_pointer(least_, most + 16 - least_, 16, name);
}

std::uint32_t SharedOperand::address(int row, int byte) const {
  const std::uint32_t eight = start_ + std::uint32_t(row / 8) * stride_;
  if (!span_) return eight + std::uint32_t(byte / 16) * leading_ + std::uint32_t(row % 8 * 16);
  return exchange(eight + std::uint32_t(row % 8) * span_ + std::uint32_t(byte), span_);
}

// ---- metadata: PTX ISA 9.7.15.6.1, 9.7.15.6.2

namespace {

// The columns that the first `groups` groups of four bits in a word keep, from column `first` on.
void decode(std::uint32_t bits, int groups, int first, int lane, std::uint8_t* columns) {
  for (int j = 0; j < groups; ++j, bits >>= 4) {
    const int low = bits & 3, high = bits >> 2 & 3;
    if (low >= high)
      block().fail("wgmma: the metadata of thread %d of the warpgroup holds 0x%x, which is not two rising columns",
                   lane, bits & 15);
    columns[2 * j] = std::uint8_t(first + 4 * j + low);
    columns[2 * j + 1] = std::uint8_t(first + 4 * j + high);
  }
}

}  // namespace

void decode_metadata(const std::uint32_t* words, MatrixType type, int selector, Columns& columns) {
  const bool bytes = type == MatrixType::e4m3 || type == MatrixType::s8;
  for (int i = 0; i < kWgmmaRows; ++i) {
    const int warp = i / 16 * 32, g = i % 8, high = i % 16 / 8;
    for (int q = 0; q < 2; ++q) {
      // 16 bits: lanes t = 2 * selector + q have rows g and g + 8 of columns 16q to 16q + 15
      // 8 bits: lanes t = 2q + high have row g + 8 * high of columns 32q to 32q + 31
      const int lane = warp + 4 * g + (bytes ? 2 * q + high : 2 * selector + q);
      if (bytes) {
        decode(words[lane], 8, 32 * q, lane, &columns[i][16 * q]);
      } else {
        decode(words[lane] >> 16 * high, 4, 16 * q, lane, &columns[i][8 * q]);
      }
    }
  }
}

// ---- the product

void place_fragment(int thread, const std::uint32_t* registers, Kept& kept) {
  const int g = thread % 32 / 4, t = thread % 4;
  for (int r = 0; r < 4; ++r)
    std::memcpy(&kept[thread / 32 * 16 + g + 8 * (r % 2)][4 * t + 16 * (r / 2)], &registers[r], 4);
}

namespace {

template <MatrixType type>
inline constexpr int kSize = type == MatrixType::f16 || type == MatrixType::bf16 ? 2 : 1;

template <MatrixType type>
float value_at(const std::byte* p) {
  std::uint16_t bits = 0;
  std::memcpy(&bits, p, kSize<type>);
  if constexpr (type == MatrixType::f16) return value_of_f16(bits);
  if constexpr (type == MatrixType::bf16) return value_of_bf16(bits);
  if constexpr (type == MatrixType::e4m3) return value_of_e4m3(std::uint8_t(bits));
  if constexpr (type == MatrixType::s8) return std::int8_t(bits);
}

// Eight neighbouring columns at a time.
using Four = float __attribute__((vector_size(16)));
struct Eight {
  Four low, high;
};

// A sum of 32 products of bytes is an integer below 2^24: exact in f32.
template <MatrixType type>
void multiply_type(const Kept& a, const Columns& columns, const std::byte (*b)[kDepthBytes], int n,
                   float (*product)[kMostColumns]) {
  constexpr int size = kSize<type>, kept = kKeptBytes / size, depth = kDepthBytes / size;
  alignas(16) static float transposed[kDepthBytes][kMostColumns];
  for (int k = 0; k < depth; ++k)
    for (int j = 0; j < n; ++j) transposed[k][j] = value_at<type>(b[j] + k * size);
  for (int i = 0; i < kWgmmaRows; ++i) {
    float row[kept];
    const float* of_column[kept];
    for (int k = 0; k < kept; ++k) {
      row[k] = value_at<type>(a[i] + k * size);
      of_column[k] = transposed[columns[i][k]];
    }
    for (int j = 0; j < n; j += 8) {
      Eight sum{};
      for (int k = 0; k < kept; ++k) {
        const auto& eight = *reinterpret_cast<const Eight*>(of_column[k] + j);
        sum.low += row[k] * eight.low;
        sum.high += row[k] * eight.high;
      }
      *reinterpret_cast<Eight*>(product[i] + j) = sum;
    }
  }
}

}  // namespace

void multiply(MatrixType type, const Kept& a, const Columns& columns, const std::byte (*b)[kDepthBytes], int n,
              float (*product)[kMostColumns]) {
  switch (type) {
    case MatrixType::f16:
      return multiply_type<MatrixType::f16>(a, columns, b, n, product);
    case MatrixType::bf16:
      return multiply_type<MatrixType::bf16>(a, columns, b, n, product);
    case MatrixType::e4m3:
      return multiply_type<MatrixType::e4m3>(a, columns, b, n, product);
    case MatrixType::s8:
      return multiply_type<MatrixType::s8>(a, columns, b, n, product);
  }
}

}  // namespace sparseops_emulation
