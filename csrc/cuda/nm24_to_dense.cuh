// Expands a 2:4 weight to dense.
//
//   dense[m, 4j + i] = values[m, 2j]      where i is the low half of nibble j of row m
//                      values[m, 2j + 1]  where i is its high half
//                      0                  elsewhere
//
//   values [rows, cols/2]  elements of 1, 2 or 4 bytes, moved bit for bit: no arithmetic, NaNs keep their payload
//   meta   [rows, cols/8]  bytes; the low nibble of byte b is group 2b, the high one group 2b + 1
//   dense  [rows, cols]
//
// All three are contiguous and cols is a multiple of 32, so no row begins within a byte of meta and the weight is one
// run of groups: the kernel needs no rows. Nibbles are trusted to hold two different columns (NM24.validate() proves
// it); a bad one loses a value, but nothing is ever written outside its own group.
//
// Bound: memory. For elements of e bytes it reads e/2 + 1/8 and writes e bytes per column.
// State: it has not yet run on a GPU. It compiles for every architecture of the default list, and tests/emulation runs
// it on the CPU.
#pragma once
#include <cstdint>

namespace sparseops {

template <int kBytes>
struct ElementOf;
template <>
struct ElementOf<1> {
  using type = uint8_t;
};
template <>
struct ElementOf<2> {
  using type = uint16_t;
};
template <>
struct ElementOf<4> {
  using type = uint32_t;
};

// One thread fills one unit of dense: 16 bytes, the widest store there is, next to its neighbour's.
template <int kElementSize>
struct NM24ToDenseConfig {
  using element_t = typename ElementOf<kElementSize>::type;
  static constexpr int kThreads = 256;
  static constexpr int kColumns = 16 / kElementSize;  // of a unit
  static constexpr int kGroups = kColumns / 4;
  static constexpr int kValues = kColumns / 2;

  static_assert(sizeof(element_t) == kElementSize);
  static_assert(kGroups >= 1 && kGroups * 4 == kColumns, "a unit is whole groups");
  static_assert(32 % kColumns == 0, "a row, a multiple of 32 columns, is whole units");
};

template <typename element_t, int kCount>
struct alignas(kCount * sizeof(element_t)) Pack {
  element_t element[kCount];
};

// The nibbles of a unit, that of its first group lowest.
template <int kGroups>
__device__ inline unsigned nibbles_of(const uint8_t* meta, int64_t unit) {
  if constexpr (kGroups == 1) return meta[unit >> 1] >> (4 * (unit & 1)) & 0xF;
  unsigned nibbles = 0;
#pragma unroll
  for (int byte = 0; byte < kGroups / 2; ++byte) nibbles |= meta[unit * (kGroups / 2) + byte] << (8 * byte);
  return nibbles;
}

// What stands in one of a group's four columns. Chosen by comparison, not by indexing: everything stays in registers.
template <typename element_t>
__device__ inline element_t column_of_group(unsigned column, unsigned nibble, element_t first, element_t second) {
  if (column == (nibble & 3)) return first;
  if (column == nibble >> 2) return second;
  return 0;
}

template <int kElementSize>
__global__ void __launch_bounds__(NM24ToDenseConfig<kElementSize>::kThreads)
    nm24_to_dense_kernel(const void* values, const uint8_t* meta, void* dense, int64_t units) {
  using Config = NM24ToDenseConfig<kElementSize>;
  using element_t = typename Config::element_t;

  const int64_t unit = int64_t(blockIdx.x) * Config::kThreads + threadIdx.x;
  if (unit >= units) return;

  const unsigned nibbles = nibbles_of<Config::kGroups>(meta, unit);
  const auto kept = static_cast<const Pack<element_t, Config::kValues>*>(values)[unit];
  Pack<element_t, Config::kColumns> out;
#pragma unroll
  for (int group = 0; group < Config::kGroups; ++group) {
    const unsigned nibble = nibbles >> (4 * group) & 0xF;
#pragma unroll
    for (unsigned column = 0; column < 4; ++column) {
      out.element[4 * group + column] =
          column_of_group(column, nibble, kept.element[2 * group], kept.element[2 * group + 1]);
    }
  }
  static_cast<Pack<element_t, Config::kColumns>*>(dense)[unit] = out;
}

}  // namespace sparseops
