// kernels: nm24_compress
// Pruning and packing, bit for bit, against the rule as formats/nm24.py words it: in numbers, not in bits.
#include <limits>

#include "ops.h"
#include "test_support.h"

using namespace sparseops;

namespace {

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::f32
                         : std::is_same_v<T, __half> ? DType::f16
                                                     : DType::bf16;

// NaN counts as infinite; of equal magnitudes the lower column comes first.
template <class T>
bool comes_first(const T* group, int a, int b) {
  auto size = [&](int column) {
    const double value = emu::to_double(group[column]);
    return std::isnan(value) ? std::numeric_limits<double>::infinity() : std::abs(value);
  };
  return size(a) > size(b) || (size(a) == size(b) && a < b);
}

template <class T>
void compress(int64_t rows, int64_t cols, const emu::Buffer<T>& dense) {
  emu::Buffer<T> values(rows * cols / 2);
  emu::Buffer<uint8_t> meta(rows * cols / 8);
  emu::require(cuda_nm24_compress(dense.data(), values.data(), meta.data(), rows, cols, kDType<T>, 0, nullptr));

  std::vector<T> expected_values;
  std::vector<uint8_t> expected_meta(meta.size());
  for (int64_t group = 0; group < rows * cols / 4; ++group) {
    const T* const columns = &dense[group * 4];
    int order[] = {0, 1, 2, 3};
    std::sort(order, order + 4, [&](int a, int b) { return comes_first(columns, a, b); });
    std::sort(order, order + 2);
    for (int i = 0; i < 2; ++i) expected_values.push_back(columns[order[i]]);
    expected_meta[group / 2] |= (order[0] | order[1] << 2) << group % 2 * 4;
  }
  emu::expect_equal(values, expected_values);
  emu::expect_equal(meta, expected_meta);
}

template <class T>
T from_bits(uint32_t high_bits) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&high_bits) + 4 - sizeof(T), sizeof(T));
  return value;
}

// Any bits at all: NaNs of all payloads, infinities, subnormals; and often the same magnitude again.
template <class T>
void any_bits(int64_t rows, int64_t cols) {
  emu::Random random(rows + cols);
  emu::Buffer<T> dense(rows * cols);
  for (size_t i = 0; i < dense.size(); ++i) {
    dense[i] = from_bits<T>(static_cast<uint32_t>(random.below(uint64_t(1) << 32)));
    if (i % 4 > 0 && random.below(4) == 0) dense[i] = dense[i - 1];
  }
  compress(rows, cols, dense);
  emu::expect_ideal_traffic({});
}

// Every group of four of numbers that differ in ways that could matter.
template <class T>
void all_groups() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
  const T least = from_bits<T>(1u << (32 - 8 * sizeof(T)));  // subnormal
  const T greatest = std::is_same_v<T, float>    ? T(3.4028235e38f)
                     : std::is_same_v<T, __half> ? T(65504.f)
                                                 : T(3.3895e38f);
  const T numbers[] = {T(0.f),        T(-0.f),  least,        T(1.f),        T(-1.f),
                       T(1.0078125f), greatest, T(kInfinity), T(-kInfinity), T(kNaN)};
  constexpr int64_t kNumbers = 10, kGroups = kNumbers * kNumbers * kNumbers * kNumbers;
  emu::Buffer<T> dense(kGroups * 4);
  for (int64_t i = 0; i < kGroups; ++i)
    for (int64_t column = 0, rest = i; column < 4; ++column, rest /= kNumbers)
      dense[i * 4 + column] = numbers[rest % kNumbers];
  compress(kGroups * 4 / 32, 32, dense);
}

// What the kernel cannot take is refused, and nothing is written for a weight without elements.
void refusals() {
  emu::Buffer<float> dense(64), values(32);
  emu::Buffer<uint8_t> meta(8);
  auto call = [&](float* from, float* to, int64_t rows, int64_t cols, DType dtype) {
    return cuda_nm24_compress(from, to, meta.data(), rows, cols, dtype, 0, nullptr);
  };
  const char* const refused[] = {
      call(dense.data(), values.data(), 2, 32, DType::i8), call(dense.data(), values.data(), 1, 48, DType::f32),
      call(dense.data(), values.data(), -1, 32, DType::f32), call(dense.data() + 2, values.data(), 1, 32, DType::f32),
      call(dense.data(), values.data() + 1, 1, 32, DType::f32)};
  for (const char* text : refused)
    if (!text || std::strncmp(text, "nm24_compress: ", 15) != 0) throw emu::Error("a call was not refused");
  emu::require(call(nullptr, nullptr, 0, 32, DType::f32));
  emu::require(call(nullptr, nullptr, 3, 0, DType::f32));
}

template <class T>
void cases(emu::Tests& tests, const std::string& type) {
  // A thread takes 16 bytes, a warp 512, a block 4096: at most 32 groups of four and a whole row around each.
  for (int64_t cols : {32, 64, 96, 128, 160, 224, 256, 288, 992, 1024, 1056, 2016, 2048, 2080, 4128})
    tests.run(type + " any bits rows=1 cols=" + std::to_string(cols), [&] { any_bits<T>(1, cols); });
  for (int64_t rows : {2, 3, 7, 8, 9, 31, 32, 33, 65})
    tests.run(type + " any bits cols=32 rows=" + std::to_string(rows), [&] { any_bits<T>(rows, 32); });
  tests.run(type + " all groups", all_groups<T>);
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  cases<float>(tests, "f32");
  cases<__half>(tests, "f16");
  cases<__nv_bfloat16>(tests, "bf16");
  tests.run("refusals", refusals);
  return tests.result();
}
