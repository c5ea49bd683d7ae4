// See ptx_emulation.h. Lanes are numbered as in the PTX manual: lane = 4g + t.
#include "ptx_emulation.h"

#include <cstring>

#include "block.h"
#include "number_formats.h"
#include "shared_memory.h"

namespace sparseops_emulation {

using memory::Access;

// ---- cp.async: PTX ISA 9.7.9.25.3
//
// The device may write at any moment between the instruction and the wait. Here the destination is spoiled at once, and
// the content arrives at the wait, as late as is allowed: whoever reads in between gets NaNs.

void cp_async(std::uint32_t dst, const void* src, unsigned bytes, unsigned src_bytes) {
  Block& b = block();
  b.self().site = EMU_SITE;
  if (src_bytes > bytes) b.fail("cp.async: %u source bytes for %u", src_bytes, bytes);
  // where nothing is read the manual demands nothing of src; that the address is valid is the rule of ptx.cuh
  require_global(src, std::max(src_bytes, 1u), bytes, "cp.async");
  Copy copy{shared_pointer(dst, bytes, bytes, "cp.async"), {}, bytes, EMU_SITE};
  if (src_bytes) memory::check(src, src_bytes, Access::read, EMU_SITE);
  if (src_bytes) memory::count(src, src_bytes, Access::read, EMU_SITE);
  memory::begin_copy(copy.destination, bytes, EMU_SITE);
  memory::count(copy.destination, bytes, Access::write, EMU_SITE);
  std::memcpy(copy.content.data(), src, src_bytes);
  std::memset(copy.destination, 0xff, bytes);
  b.self().open_copies.push_back(copy);
}

void cp_async_commit() {
  Thread& me = block().self();
  me.copy_groups.push_back(std::move(me.open_copies));
  me.open_copies.clear();
}

void cp_async_wait(unsigned pending) {
  auto& groups = block().self().copy_groups;
  for (; groups.size() > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      memory::end_copy(copy.destination, copy.bytes, copy.site);
      std::memcpy(copy.destination, copy.content.data(), copy.bytes);
    }
  }
}

// ---- ldmatrix: PTX ISA 9.7.14.5.15

void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t row_address, bool transposed) {
  struct Lane {
    const std::byte* row;
    std::uint32_t* r;
  } lane{nullptr, r};
  const void* site = EMU_SITE;
  Block& b = block();
  b.self().site = site;
  lane.row = shared_pointer(row_address, 16, 16, "ldmatrix");
  memory::count(lane.row, 16, Access::read, site);
  const unsigned me = b.self().number, first = me - b.self().lane;
  b.meet(
      transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, &lane,
      [=](const Lanes& lanes) {
        for (int l = 0; l < 32; ++l) {
          const int g = l / 4, t = l % 4;
          memory::running(first + l);  // the instruction orders nothing: it is the receiver that reads
          for (int m = 0; m < 4; ++m) {
            const auto at = [&](int i, int j) {
              const std::byte* element = static_cast<const Lane*>(lanes[8 * m + i])->row + 2 * j;
              memory::check(element, 2, Access::read, site);
              std::uint16_t bits;
              std::memcpy(&bits, element, 2);
              return std::uint32_t{bits};
            };
            static_cast<Lane*>(lanes[l])->r[m] =
                transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
          }
        }
        memory::running(me);
      },
      site);
}

// ---- mma: PTX ISA 9.7.14.5.8, 9.7.14.6

namespace {

template <class T>
float value(std::uint32_t bits) {
  return std::is_same_v<T, __nv_bfloat16> ? value_of_bf16(bits) : value_of_f16(bits);
}

template <class Accumulator>
struct Operands {
  Accumulator* d;
  const std::uint32_t *a, *b;
  std::uint32_t metadata = 0;
};

template <class Accumulator>
const Operands<Accumulator>& of(const Lanes& lanes, int lane) {
  return *static_cast<const Operands<Accumulator>*>(lanes[lane]);
}

// Adds the 16x8 matrix `sum` to the accumulators: register i of a lane is row g + 8 * (i / 2), column 2t + i % 2.
template <class Accumulator>
void accumulate(const Lanes& lanes, const Accumulator (&sum)[16][8]) {
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) of<Accumulator>(lanes, l).d[i] += sum[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}

// Of `groups` groups of four columns, from column `first` on: which columns a row has values for. Four bits a group,
// the lower index in the lower two; equal or falling indices mean nothing to mma.sp::ordered_metadata.
void decode(std::uint32_t bits, int groups, int first, int lane, std::uint8_t* columns) {
  for (int j = 0; j < groups; ++j, bits >>= 4) {
    const int low = bits & 3, high = bits >> 2 & 3;
    if (low >= high)
      block().fail("mma.sp: the metadata of lane %d holds 0x%x, which is not two rising columns of a group", lane,
                   bits & 15);
    columns[2 * j] = static_cast<std::uint8_t>(first + 4 * j + low);
    columns[2 * j + 1] = static_cast<std::uint8_t>(first + 4 * j + high);
  }
}

}  // namespace

template <class T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  Operands<float> operands{d, a, b};
  block().meet(
      "mma.m16n8k16", ~0u, &operands,
      [](const Lanes& lanes) {
        float A[16][16], B[16][8], sum[16][8] = {};
        for (int l = 0; l < 32; ++l) {
          const int g = l / 4, t = l % 4;
          const auto& lane = of<float>(lanes, l);
          for (int e = 0; e < 8; ++e)
            A[g + 8 * (e / 2 % 2)][2 * t + e % 2 + 8 * (e / 4)] = value<T>(lane.a[e / 2] >> 16 * (e % 2));
          for (int e = 0; e < 4; ++e) B[2 * t + e % 2 + 8 * (e / 2)][g] = value<T>(lane.b[e / 2] >> 16 * (e % 2));
        }
        for (int i = 0; i < 16; ++i)
          for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) sum[i][j] += A[i][k] * B[k][j];
        accumulate(lanes, sum);
      },
      EMU_SITE);
}

template <class T>
void mma_sp_m16n8k32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4], std::uint32_t metadata,
                     int selector) {
  Operands<float> operands{d, a, b, metadata};
  block().meet(
      selector ? "mma.sp.m16n8k32, selector 1" : "mma.sp.m16n8k32, selector 0", ~0u, &operands,
      [selector](const Lanes& lanes) {
        float A[16][16], B[32][8], sum[16][8] = {};
        std::uint8_t column[16][16];
        for (int l = 0; l < 32; ++l) {
          const int g = l / 4, t = l % 4;
          const auto& lane = of<float>(lanes, l);
          for (int e = 0; e < 8; ++e) {
            A[g + 8 * (e / 2 % 2)][2 * t + e % 2 + 8 * (e / 4)] = value<T>(lane.a[e / 2] >> 16 * (e % 2));
            B[2 * t + e % 2 + 8 * (e / 2)][g] = value<T>(lane.b[e / 2] >> 16 * (e % 2));
          }
        }
        // the lanes with t = 2 * selector + q have columns 16q to 16q + 15: row g in the low half, row g + 8 in the high
        for (int i = 0; i < 16; ++i) {
          for (int q = 0; q < 2; ++q) {
            const int l = 4 * (i % 8) + 2 * selector + q;
            decode(of<float>(lanes, l).metadata >> 16 * (i / 8), 4, 16 * q, l, &column[i][8 * q]);
          }
        }
        for (int i = 0; i < 16; ++i)
          for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) sum[i][j] += A[i][k] * B[column[i][k]][j];
        accumulate(lanes, sum);
      },
      EMU_SITE);
}

template void mma_m16n8k16<__half>(float (&)[4], const std::uint32_t (&)[4], const std::uint32_t (&)[2]);
template void mma_m16n8k16<__nv_bfloat16>(float (&)[4], const std::uint32_t (&)[4], const std::uint32_t (&)[2]);
template void mma_sp_m16n8k32<__half>(float (&)[4], const std::uint32_t (&)[4], const std::uint32_t (&)[4],
                                      std::uint32_t, int);
template void mma_sp_m16n8k32<__nv_bfloat16>(float (&)[4], const std::uint32_t (&)[4], const std::uint32_t (&)[4],
                                             std::uint32_t, int);

void mma_sp_m16n8k64(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4],
                     std::uint32_t metadata) {
  Operands<std::int32_t> operands{d, a, b, metadata};
  block().meet(
      "mma.sp.m16n8k64", ~0u, &operands,
      [](const Lanes& lanes) {
        std::int32_t A[16][32], B[64][8], sum[16][8] = {};
        std::uint8_t column[16][32];
        const auto byte = [](const std::uint32_t* r, int e) {
          return static_cast<std::int8_t>(r[e / 4] >> 8 * (e % 4));
        };
        for (int l = 0; l < 32; ++l) {
          const int g = l / 4, t = l % 4;
          const auto& lane = of<std::int32_t>(lanes, l);
          for (int e = 0; e < 16; ++e) {
            A[g + 8 * (e / 4 % 2)][4 * t + e % 4 + 16 * (e / 8)] = byte(lane.a, e);
            B[4 * t + e % 4 + 16 * (e / 4)][g] = byte(lane.b, e);
          }
          // row g + 8 * (t % 2), columns 32 * (t / 2) to + 31
          decode(lane.metadata, 8, 32 * (t / 2), l, &column[g + 8 * (t % 2)][16 * (t / 2)]);
        }
        for (int i = 0; i < 16; ++i)
          for (int k = 0; k < 32; ++k)
            for (int j = 0; j < 8; ++j) sum[i][j] += A[i][k] * B[column[i][k]][j];
        accumulate(lanes, sum);
      },
      EMU_SITE);
}

// ---- global memory

std::uint32_t atomic_add_acq_rel(std::uint32_t* counter, std::uint32_t value) {
  block().self().site = EMU_SITE;
  require_global(counter, 4, 4, "atom.add");
  memory::check(counter, 4, Access::atomic, EMU_SITE);
  memory::acquire(counter);
  memory::release(counter);
  const std::uint32_t old = *counter;
  *counter = old + value;
  return old;
}

uint4 load_streaming(const void* pointer) {
  block().self().site = EMU_SITE;
  require_global(pointer, 16, 16, "ld.global.nc");
  memory::check(pointer, 16, Access::read_only, EMU_SITE);
  memory::count(pointer, 16, Access::read, EMU_SITE);
  uint4 v;
  std::memcpy(&v, pointer, 16);
  return v;
}

}  // namespace sparseops_emulation
