// kernels: nm24_to_dense
// Elements of every size, rows and units about the size of a block, and that nothing but bits moves.
#include "ops.h"
#include "test_support.h"

using namespace sparseops;

namespace {

template <class Element>
void expand(int64_t rows, int64_t cols) {
  emu::Random random(static_cast<uint64_t>(rows * 1000 + cols));
  const emu::Buffer<uint8_t> meta(emu::random_meta(rows * cols / 4, random));
  emu::Buffer<Element> values(static_cast<size_t>(rows * cols / 2)), dense(static_cast<size_t>(rows * cols));
  std::vector<Element> expected(dense.size());
  for (size_t i = 0; i < values.size(); ++i) values[i] = random.number<Element>();
  for (size_t i = 0; i < values.size() / 2; ++i) {
    const unsigned nibble = meta[i / 2] >> 4 * (i % 2) & 15;
    expected[4 * i + (nibble & 3)] = values[2 * i];
    expected[4 * i + (nibble >> 2)] = values[2 * i + 1];
  }
  const NM24Weight weight{values.data(), meta.data(), rows, cols};
  emu::require(cuda_nm24_to_dense(weight, dense.data(), sizeof(Element), 0, nullptr));
  emu::expect_equal(dense, expected);
  if (sizeof(Element) == 1)
    emu::expect_ideal_traffic({{"nibbles_of", "a thread's two bytes of meta come one by one: the second hits L1"}});
  else
    emu::expect_ideal_traffic({});
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  // 32 columns are 2, 4 or 8 units; 256 units are a block
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{1, 32}, {7, 96}, {127, 32}, {128, 32}, {129, 32}, {33, 512}, {1, 4128}}) {
    tests.run("bytes rows=%ld cols=%ld", rows, cols, [&, rows = rows, cols = cols] { expand<uint8_t>(rows, cols); });
    tests.run("16 bits rows=%ld cols=%ld", rows, cols, [&, rows = rows, cols = cols] { expand<uint16_t>(rows, cols); });
    tests.run("32 bits rows=%ld cols=%ld", rows, cols, [&, rows = rows, cols = cols] { expand<uint32_t>(rows, cols); });
  }
  return tests.result();
}
