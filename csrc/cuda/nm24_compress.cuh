// Prunes and packs a dense weight to 2:4: of each four columns the two largest magnitudes stay. nm24_to_dense.cuh is
// the way back.
//
//   values[m, 2j], values[m, 2j + 1] = the kept elements of dense[m, 4j .. 4j + 3], in the order of their columns
//   nibble j of row m                = their columns in the group, the first in the low half, the second in the high
//
//   dense  [rows, cols]    f32, f16, bf16; packed columns
//   values [rows, cols/2]  moved bit for bit: no arithmetic, NaNs keep their payload
//   meta   [rows, cols/8]  bytes; the low nibble of byte b is group 2b, the high one group 2b + 1
//
// NaN counts as infinite, and of equal magnitudes the lower column stays: the rule of sparseops/formats/nm24.py. (torch
// itself may quiet a signalling NaN of 16 bits on its way through a gather.) All three are contiguous and cols is a
// multiple of 32, so no row begins within a byte of meta and the weight is one run of groups: the kernel needs no rows.
//
// Bound: memory. For elements of e bytes it reads e and writes e/2 + 1/8 bytes per column.
// State: it has not yet run on a GPU; tests/emulation runs it on the CPU.
#pragma once
#include <cstdint>

#include "cuda/ptx.cuh"

namespace sparseops {

// The magnitude of an element is its bits without the sign: they order as the numbers do, and NaN comes after infinity.
struct F32Bits {
  using bits_t = uint32_t;
  static constexpr bits_t kInfinity = 0x7F800000, kMagnitude = 0x7FFFFFFF;
};
struct F16Bits {
  using bits_t = uint16_t;
  static constexpr bits_t kInfinity = 0x7C00, kMagnitude = 0x7FFF;
};
struct BF16Bits {
  using bits_t = uint16_t;
  static constexpr bits_t kInfinity = 0x7F80, kMagnitude = 0x7FFF;
};

// One thread packs one unit of dense: 16 bytes, the widest load there is, next to its neighbour's.
template <class Bits>
struct NM24CompressConfig {
  using bits_t = typename Bits::bits_t;
  static constexpr int kThreads = 256;
  static constexpr int kColumns = 16 / sizeof(bits_t);  // of a unit
  static constexpr int kGroups = kColumns / 4;

  static_assert(kGroups == 1 || kGroups == 2, "a unit is a byte of meta, or half of one");
  static_assert(kThreads % 32 == 0, "the other half of a byte is in the same warp");
};

template <class bits_t, int kCount>
struct alignas(kCount * sizeof(bits_t)) BitsPack {
  bits_t element[kCount];
};

template <class bits_t>
struct KeptTwo {
  bits_t first, second;
  unsigned nibble;
};

// Each column is compared with each other one and is kept if it loses at most once.
template <class Bits, class bits_t>
SPARSEOPS_DEVICE KeptTwo<bits_t> keep_two(const bits_t* group) {
  unsigned size[4], lost[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) size[i] = min(unsigned(group[i] & Bits::kMagnitude), unsigned(Bits::kInfinity));
#pragma unroll
  for (int low = 0; low < 4; ++low) {
#pragma unroll
    for (int high = low + 1; high < 4; ++high) {
      const bool low_loses = size[high] > size[low];
      lost[low] += low_loses;
      lost[high] += !low_loses;
    }
  }
  // Chosen by comparison, not by indexing: everything stays in registers.
  const bool keep0 = lost[0] < 2, keep1 = lost[1] < 2, keep2 = lost[2] < 2, keep3 = lost[3] < 2;
  KeptTwo<bits_t> kept;
  kept.first = keep0 ? group[0] : keep1 ? group[1] : group[2];
  kept.second = keep3 ? group[3] : keep2 ? group[2] : group[1];
  kept.nibble = (keep0 ? 0 : keep1 ? 1 : 2) | (keep3 ? 3 : keep2 ? 2 : 1) << 2;
  return kept;
}

template <class Bits>
__global__ void __launch_bounds__(NM24CompressConfig<Bits>::kThreads)
    nm24_compress_kernel(const void* dense, void* values, uint8_t* meta, int64_t units) {
  using Config = NM24CompressConfig<Bits>;
  using bits_t = typename Config::bits_t;

  const int64_t unit = int64_t(blockIdx.x) * Config::kThreads + threadIdx.x;
  const bool inside = unit < units;  // those outside stay for the shuffle
  BitsPack<bits_t, Config::kColumns> in = {};
  if (inside) in = static_cast<const BitsPack<bits_t, Config::kColumns>*>(dense)[unit];

  BitsPack<bits_t, Config::kColumns / 2> out;
  unsigned nibbles = 0;
#pragma unroll
  for (int group = 0; group < Config::kGroups; ++group) {
    const KeptTwo<bits_t> kept = keep_two<Bits>(in.element + 4 * group);
    out.element[2 * group] = kept.first;
    out.element[2 * group + 1] = kept.second;
    nibbles |= kept.nibble << (4 * group);
  }
  if constexpr (Config::kGroups == 1) nibbles |= __shfl_down_sync(0xffffffffu, nibbles, 1) << 4;
  if (!inside) return;

  static_cast<BitsPack<bits_t, Config::kColumns / 2>*>(values)[unit] = out;
  constexpr int kUnitsOfByte = 2 / Config::kGroups;
  if (unit % kUnitsOfByte == 0) meta[unit / kUnitsOfByte] = static_cast<uint8_t>(nibbles);
}

}  // namespace sparseops
