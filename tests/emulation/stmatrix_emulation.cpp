// stmatrix: PTX ISA 9.7.14.5.16. See ptx_sm90_emulation.h.
#include <cstring>

#include "block.h"
#include "ptx_sm90_emulation.h"
#include "shared_memory.h"

namespace sparseops_emulation {

using memory::Access;

// Lanes 8m to 8m + 7 name the rows of matrix m; the addresses of those behind the last matrix do not matter. Lane
// 4g + t has elements 2t and 2t + 1 of row g of each matrix, or, transposed, of column g.
void stmatrix(std::uint32_t row_address, const std::uint32_t* r, int count, bool transposed) {
  struct Lane {
    std::byte* row;
    const std::uint32_t* r;
  } lane{nullptr, r};
  const void* site = EMU_SITE;
  Block& b = block();
  b.self().site = site;
  if (count != 1 && count != 2 && count != 4) b.fail("stmatrix: there is none of %d matrices", count);
  if (b.self().lane < 8u * unsigned(count)) {
    lane.row = shared_pointer(row_address, 16, 16, "stmatrix");
    memory::count(lane.row, 16, Access::write, site);
  }
  const unsigned me = b.self().number, first = me - b.self().lane;
  static constexpr const char* kNames[2][5] = {{"", "stmatrix.x1", "stmatrix.x2", "", "stmatrix.x4"},
                                               {"", "stmatrix.trans.x1", "stmatrix.trans.x2", "", "stmatrix.trans.x4"}};
  b.meet(
      kNames[transposed][count], ~0u, &lane,
      [=](const Lanes& lanes) {
        for (int l = 0; l < 32; ++l) {
          const int g = l / 4, t = l % 4;
          memory::running(first + l);  // the instruction orders nothing: it is the giver that writes
          for (int m = 0; m < count; ++m) {
            for (int half = 0; half < 2; ++half) {
              const int i = transposed ? 2 * t + half : g, j = transposed ? g : 2 * t + half;
              std::byte* element = static_cast<const Lane*>(lanes[8 * m + i])->row + 2 * j;
              memory::check(element, 2, Access::write, site);
              const auto bits = std::uint16_t(static_cast<const Lane*>(lanes[l])->r[m] >> 16 * half);
              std::memcpy(element, &bits, 2);
            }
          }
        }
        memory::running(me);
      },
      site);
}

}  // namespace sparseops_emulation
