// What the test of a kernel needs: global memory, 2:4 weights, comparisons, and a main() that names its cases.
//
// A test is one file, tests/emulation/<kernel>_test.cpp. build.py finds it and builds it three times; test_emulation.py
// runs it. Its first line names the csrc/cuda/*.cu to link, device.cu apart:
//
//     // kernels: nm24_scale
//     #include "ops.h"
//     #include "test_support.h"
//     using namespace sparseops;
//
//     template <class T>
//     void scale(int64_t n) {
//       emu::Random random(n);
//       emu::Buffer<T> x = random.normal<T>(n), y(n);          // y is full of NaNs until the kernel fills it
//       emu::require(cuda_nm24_scale(x.data(), y.data(), n, 0, nullptr));         // host code returns an error's text
//       std::vector<double> expected(n);
//       for (int64_t i = 0; i < n; ++i) expected[i] = 2 * double(float(x[i]));
//       emu::expect_close(y, expected, {});
//       emu::expect_ideal_traffic({{"store_tail", "the last row may end within a sector"}});
//     }
//
//     int main(int argc, char** argv) {
//       emu::Tests tests(argc, argv);
//       for (int64_t n : {1, 255, 256, 257}) tests.run("f16 n=%ld", n, [&] { scale<__half>(n); });
//       return tests.result();
//     }
//
// A kernel can be called without its host code too: include its .cuh and
//
//     emu::run(kernel<T>, grid, block, shared_bytes, arguments...);             // throws what went wrong
//     emu::run_cluster(kernel<T>, grid, block, shared_bytes, cluster, arguments...);
//
// Then, with nm24_scale_test as an example:
//
//     python tests/emulation/build.py nm24_scale_test          # plain, asan and race; or `build.py race nm24_scale_test`
//     build/emulation/plain/nm24_scale_test                    # all cases
//     build/emulation/race/nm24_scale_test f16 n=257           # those whose names hold all of these words
//     EMU_SEED=3 build/emulation/plain/nm24_scale_test         # another order of blocks, warps and threads
//     EMU_TRAFFIC=1 build/emulation/race/nm24_scale_test n=256 # what each line of the kernel costs
//
// What only one build sees: plain runs at other seeds, asan sees accesses past the end of a buffer and misaligned ones,
// race sees missing barriers, and counts traffic.
//
// A kernel written for here as well as for nvcc:
//   - takes shared memory from ptx::dynamic_shared(), or declares `alignas(16) __shared__ T name[n]`, alignas first;
//   - asks about types with `if constexpr`, never about __CUDA_ARCH__;
//   - stores a vector as a whole, `*p = make_uint4(...)` or `*p = v`; `*p = {...}` would be counted as four stores;
//   - has no thread wait for another block, but for those of its cluster;
//   - has no __shared__ variables if it is launched in clusters: there is one copy for all blocks, and the race build
//     alone notices.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "block.h"
#include "cuda_emulation.h"

namespace sparseops_emulation {

// ---- global memory

// `count` elements that end where the allocation ends: AddressSanitizer sees one more, the race check sees them all.
// Begins at a multiple of 256 bytes, as cudaMalloc's memory does, and full of NaNs.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) : memory_(allocate(count * sizeof(T), 256)), count_(count) {
    std::memset(memory_.get(), 0xff, count * sizeof(T));
    memory::watch_global(data(), count * sizeof(T));
  }
  Buffer(std::size_t count, T value) : Buffer(count) { fill(value); }
  Buffer(const std::vector<T>& content) : Buffer(content.size()) {
    if (count_) std::memcpy(memory_.get(), content.data(), count_ * sizeof(T));
  }
  ~Buffer() {
    if (memory_) memory::forget_global(data());
  }
  Buffer(Buffer&&) = default;

  T* data() { return reinterpret_cast<T*>(memory_.get()); }
  const T* data() const { return reinterpret_cast<const T*>(memory_.get()); }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) { return data()[i]; }
  const T& operator[](std::size_t i) const { return data()[i]; }
  void fill(T value) { std::fill_n(data(), count_, value); }

 private:
  std::unique_ptr<std::byte[], Free> memory_;
  std::size_t count_;
};

// ---- data

template <class T>
double to_double(T v) {
  if constexpr (std::is_arithmetic_v<T>)
    return static_cast<double>(v);
  else
    return static_cast<double>(static_cast<float>(v));
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  std::uint64_t below(std::uint64_t bound) { return engine_() % bound; }
  // One number: normally distributed, or for int8 anything.
  template <class T>
  T number() {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(engine_());
    else
      return T(normal_(engine_));
  }
  template <class T>
  Buffer<T> normal(std::size_t count) {
    Buffer<T> buffer(count);
    for (std::size_t i = 0; i < count; ++i) buffer[i] = number<T>();
    return buffer;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

// The metadata of a weight in slabs, as sparseops/formats/nm24_slabs.py packs it: 16-bit types if not `bytes`.
std::vector<std::uint8_t> pack_slabs(const std::vector<std::uint8_t>& meta, std::int64_t rows, std::int64_t cols,
                                     std::int64_t groups, bool bytes, std::int64_t* slab_rows);
// Two rising columns for each group of four, two groups to a byte.
std::vector<std::uint8_t> random_meta(std::int64_t groups_of_four, Random& random);

// A random 2:4 weight in all its forms.
template <class T>
struct Weight {
  std::int64_t rows, cols, slab_rows = 0;
  std::vector<double> dense;  // [rows, cols]
  Buffer<T> values;           // [rows, cols / 2]
  Buffer<std::uint8_t> meta;  // [rows, cols / 8]
  Buffer<std::uint8_t> slabs;

  Weight(std::int64_t rows, std::int64_t cols, Random& random, std::int64_t groups = 1)
      : Weight(rows, cols, random, random_meta(rows * cols / 4, random), groups) {}
  Weight(std::int64_t rows, std::int64_t cols, Random& random, const std::vector<std::uint8_t>& meta,
         std::int64_t groups = 1)
      : rows(rows),
        cols(cols),
        dense(rows * cols),
        values(random.normal<T>(rows * cols / 2)),
        meta(meta),
        slabs(pack_slabs(meta, rows, cols, groups, sizeof(T) == 1, &slab_rows)) {
    for (std::int64_t i = 0; i < rows * cols / 4; ++i) {
      const unsigned nibble = meta[i / 2] >> 4 * (i % 2) & 15;
      dense[4 * i + (nibble & 3)] = to_double(values[2 * i]);
      dense[4 * i + (nibble >> 2)] = to_double(values[2 * i + 1]);
    }
  }
};

// ---- checks: each throws an Error, which Tests::run reports

// Host code's result: null, or what went wrong.
void require(const char* error);

// `body` must throw an Error whose text holds `part`.
void expect_error(const std::string& part, const std::function<void()>& body);

// The same, bit for bit.
void expect_equal_bytes(const void* got, const void* expected, std::size_t count, std::size_t element_size);
template <class T>
void expect_equal(const Buffer<T>& got, const std::vector<T>& expected) {
  if (got.size() != expected.size()) throw Error("expect_equal: the sizes differ");
  expect_equal_bytes(got.data(), expected.data(), got.size(), sizeof(T));
}

// Each element within `unit` * |expected| + 2^-20 * size + 1e-6, where `unit` is the rounding of the type and `size` is
// what the sum's terms come to without their signs (the accumulators are f32); empty for results that are not sums.
void expect_within(const std::vector<double>& got, const std::vector<double>& expected, const std::vector<double>& size,
                   double unit);
template <class T>
void expect_close(const Buffer<T>& got, const std::vector<double>& expected, const std::vector<double>& size) {
  constexpr bool is_f16 = std::is_same_v<T, __half>, is_bf16 = std::is_same_v<T, __nv_bfloat16>;
  std::vector<double> values(got.size());
  for (std::size_t i = 0; i < got.size(); ++i) values[i] = to_double(got[i]);
  expect_within(values, expected, size, is_f16 ? 0x1p-11 : is_bf16 ? 0x1p-8 : std::is_integral_v<T> ? 0 : 0x1p-24);
}

// Of the blocks that shared `slabs` slabs of columns each had some, wherever there were enough to go round: the partial
// sums of every output tile and split, which lie one behind the other, are not all zeros.
void expect_all_splits_busy(const Buffer<float>& partials, std::int64_t tiles, int splits, std::int64_t slabs);

// In the race build: every load and store since the last call took as few passes over the banks of shared memory, and
// as few sectors of global memory, as its bytes need. An exception holds for the lines whose text (as EMU_TRAFFIC=1
// prints it: functions, files, line numbers) holds it; one that no case needs is an error too.
struct Exception {
  std::string where, reason;
};
void expect_ideal_traffic(const std::vector<Exception>& exceptions);

class Tests {
 public:
  Tests(int argc, char** argv) : words_(argv + 1, argv + argc) {}

  template <class F>
  void run(const std::string& name, F body) {
    run_case(name, body);
  }
  // The name as printf would write it.
  template <class A, class... B>
  void run(const char* format, A first, B... more) {
    run_formatted(format, std::make_tuple(first, more...), std::make_index_sequence<sizeof...(B)>());
  }
  int result() const;  // for main() to return

 private:
  template <class Tuple, std::size_t... i>
  void run_formatted(const char* format, const Tuple& values, std::index_sequence<i...>) {
    char name[256];
    std::snprintf(name, sizeof name, format, std::get<i>(values)...);
    run_case(name, std::get<sizeof...(i)>(values));
  }
  void run_case(const std::string& name, const std::function<void()>& body);

  std::vector<std::string> words_;
  int run_ = 0, failed_ = 0;
};

}  // namespace sparseops_emulation
