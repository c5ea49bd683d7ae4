// The emulated wgmma.mma_async.sp against the documents: operands in shared memory and registers, metadata, and all
// that may go wrong while one is in flight.
#include <cuda_fp8.h>

#include "cuda/ptx.cuh"
#include "ptx_sm90_emulation.h"
#include "reference_matrices.h"
#include "test_support.h"

using namespace sparseops;
using emu::a16, emu::a8, emu::fragment, emu::Matrix, emu::matrix, emu::Sparse, emu::MatrixType;

namespace {

template <class T>
constexpr MatrixType kType = std::is_same_v<T, __half>          ? MatrixType::f16
                             : std::is_same_v<T, __nv_bfloat16> ? MatrixType::bf16
                             : std::is_same_v<T, int8_t>        ? MatrixType::s8
                                                                : MatrixType::e4m3;
template <class T>
using sum_t = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

// ---- one instruction

enum class Fault {
  none,
  again,  // is none: a second instruction behind a second fence
  no_fence,
  no_commit,
  no_wait,
  waits_for_too_little,
  reads_sums,
  writes_sums,
  writes_metadata,
  writes_fragment,
  writes_shared,
  no_proxy_fence,
  other_descriptor,
  other_selector,
  fourth_warp_missing,
  other_instruction,
  again_without_fence,
  fragment_behind_fence,
  too_little_shared,
};

struct Job {
  MatrixType type;
  int n, selector, sums;  // of a thread
  bool accumulate;
  uint64_t a, b;  // descriptors, with addresses from where shared memory begins
  bool a_in_registers;
};

// `image` is what shared memory holds, fragments and metadata are [thread][register], and d is [thread][sum].
__global__ void multiply(Job job, const uint4* image, int chunks, const uint32_t* fragments, const uint32_t* metadata,
                         uint32_t* d, Fault fault) {
  const int t = threadIdx.x;
  auto shared = reinterpret_cast<uint4*>(ptx::dynamic_shared());
  for (int i = t; i < chunks; i += 128) shared[i] = image[i];
  if (fault != Fault::no_proxy_fence) emu::fence_proxy_async();
  __syncthreads();
  if (fault == Fault::fourth_warp_missing && t >= 96) return;
  uint32_t sums[128], a[4] = {}, word = metadata[t];
  for (int i = 0; i < job.sums; ++i) sums[i] = d[t * (job.sums) + i];
  if (job.a_in_registers)
    for (int i = 0; i < 4; ++i) a[i] = fragments[t * 4 + i];
  const uint64_t address = ptx::shared_address(shared) >> 4;
  const uint64_t b = job.b + address + (fault == Fault::other_descriptor && t == 77 ? 2 : 0);
  const int selector = job.selector + (fault == Fault::other_selector && t >= 64);
  const auto issue = [&] {
    if (job.a_in_registers)
      emu::wgmma_sp_rs(sums, job.n, job.type, a, b, word, selector, job.accumulate);
    else
      emu::wgmma_sp(sums, job.n, job.type, job.a + address, b, word, selector, job.accumulate);
  };

  if (fault == Fault::other_instruction && t < 32) emu::wgmma_commit();
  if (fault != Fault::no_fence) emu::wgmma_fence();
  issue();
  if (fault != Fault::no_commit) emu::wgmma_commit();
  if (fault == Fault::writes_sums && t == 5) sums[job.sums - 1] = 0;
  if (fault == Fault::writes_metadata && t == 6) word ^= 0x10;
  if (fault == Fault::writes_fragment && t == 100) a[3] ^= 1;
  if (fault == Fault::writes_shared && t == 0) shared[0] = {};
  if (fault == Fault::no_wait) return;
  if (fault == Fault::reads_sums) {
    for (int i = 0; i < job.sums; ++i) d[t * (job.sums) + i] = sums[i];
    return emu::wgmma_wait(0);
  }
  emu::wgmma_wait(fault == Fault::waits_for_too_little);
  if (fault == Fault::again || fault == Fault::again_without_fence || fault == Fault::fragment_behind_fence) {
    if (fault != Fault::again_without_fence) emu::wgmma_fence();
    if (fault == Fault::fragment_behind_fence && t == 64) a[0] ^= 1;
    issue();
    emu::wgmma_commit();
    emu::wgmma_wait(0);
  }
  for (int i = 0; i < job.sums; ++i) d[t * (job.sums) + i] = sums[i];
}

// ---- operands in shared memory: K-major

struct Layout {
  int span;             // of the exchange, 0 for none
  int within = 0;       // the first byte that is used of an exchanged row
  int leading, stride;  // of bytes: from a chunk to the next and from eight rows to the next
};
Layout exchanged_rows(int span, int within = 0) { return {span, within, 16, 8 * span}; }

uint64_t descriptor(int base, const Layout& layout) {
  const uint64_t code = layout.span == 128 ? 1 : layout.span == 64 ? 2 : layout.span == 32 ? 3 : 0;
  return code << 62 | uint64_t(layout.stride >> 4) << 32 | uint64_t(layout.leading >> 4) << 16 |
         uint64_t((base + layout.within) >> 4);
}

template <class T>
void place(std::vector<uint4>& image, int base, const Matrix<T>& rows, const Layout& layout) {
  for (int r = 0; r < int(rows.size()); ++r)
    for (int c = 0; c < int(rows[0].size() * sizeof(T) / 16); ++c) {
      const int linear = r / 8 * layout.stride + r % 8 * layout.span + layout.within + 16 * c;
      const int at = layout.span ? emu::exchanged(linear / 16, layout.span)
                                 : (r / 8 * layout.stride + c * layout.leading + r % 8 * 16) / 16;
      image.resize(std::max(image.size(), size_t(base / 16 + at + 1)), uint4{~0u, ~0u, ~0u, ~0u});
      std::memcpy(&image[base / 16 + at], rows[r].data() + c * 16 / sizeof(T), 16);
    }
}

// ---- a problem: 64 rows of A, n columns of B, one step of depth

template <class T>
struct Problem {
  static constexpr int kDepth = 64 / sizeof(T), kBaseOfB = 8192;
  int n;
  Sparse pattern;
  Matrix<T> a, b;  // compressed; [n][depth], as rows of shared memory
  int selector = 0;
  Layout layout_a = exchanged_rows(128), layout_b = exchanged_rows(128);
  bool a_in_registers = false, accumulate = true;
  sum_t<T> before = 3;

  Problem(int n, const Sparse& pattern, emu::Random& random)
      : n(n),
        pattern(pattern),
        a(emu::random_matrix<T>(64, kDepth / 2, random)),
        b(emu::random_matrix<T>(n, kDepth, random)) {}
  Problem(int n, emu::Random& random) : Problem(n, emu::random_pattern(64, kDepth, random), random) {}

  emu::Buffer<uint32_t> metadata() const {
    constexpr uint32_t kInvalid = 0xffffffff;  // in the lanes that must not matter
    return sizeof(T) == 2 ? emu::metadata16(pattern, selector, kInvalid) : emu::metadata8(pattern);
  }
  Job job() const {
    return {kType<T>,      n, selector, n / 2, accumulate, descriptor(0, layout_a), descriptor(kBaseOfB, layout_b),
            a_in_registers};
  }
  emu::Buffer<uint32_t> fragments() const {
    emu::Buffer<uint32_t> all(512, 0);
    for (int warp = 0; warp < 4; ++warp) {
      const auto of_warp = fragment(a, 4, sizeof(T) == 2 ? a16 : a8, 16 * warp);
      std::copy(of_warp.data(), of_warp.data() + 128, all.data() + 128 * warp);
    }
    return all;
  }
  std::vector<uint4> image() const {
    std::vector<uint4> image;
    if (!a_in_registers) place(image, 0, a, layout_a);
    place(image, kBaseOfB, b, layout_b);
    return image;
  }

  emu::Buffer<sum_t<T>> run(Fault fault = Fault::none) const { return run(job(), metadata(), fault); }
  emu::Buffer<sum_t<T>> run(const Job& job, const emu::Buffer<uint32_t>& metadata, Fault fault = Fault::none,
                            unsigned threads = 128) const {
    emu::Buffer<sum_t<T>> d(64 * n, before);
    const emu::Buffer<uint4> shared = image();
    const int chunks = int(shared.size()) - (fault == Fault::too_little_shared);
    emu::run(multiply, 1, threads, chunks * 16, job, shared.data(), chunks, fragments().data(), metadata.data(),
             reinterpret_cast<uint32_t*>(d.data()), fault);
    return d;
  }

  void expect(const emu::Buffer<sum_t<T>>& d, int times = 1) const {
    auto transposed = matrix<T>(kDepth, n);
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < n; ++j) transposed[k][j] = b[j][k];
    const auto sum = emu::product<double>(pattern, a, transposed);
    std::vector<double> got, expected, size;
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < n / 2; ++i) {
        const emu::Place place = emu::d32(t % 32, i % 4);
        got.push_back(double(d[t * (n / 2) + i]));
        expected.push_back(times * sum[t / 32 * 16 + place.row][i / 4 * 8 + place.column] +
                           (accumulate ? double(before) : 0));
        size.push_back(std::is_same_v<T, int8_t> ? 0 : 64);
      }
    emu::expect_within(got, expected, size, 0);
  }
};

// ---- the cases

template <class T>
void layouts(emu::Tests& tests, const char* type) {
  const auto run = [&](const char* name, int n, auto change) {
    tests.run("%s %s n=%d", type, name, n, [=] {
      emu::Random random(n);
      Problem<T> p(n, random);
      change(p);
      p.expect(p.run());
    });
  };
  std::vector<int> widths = {8, 24, 32, 64, 96, 192, 256};
  if (!std::is_same_v<T, int8_t>) widths.insert(widths.end(), {40, 248});
  for (const int n : widths) {
    run("128 bytes", n, [](Problem<T>&) {});
    run("registers", n, [](Problem<T>& p) { p.a_in_registers = true; });
  }
  run("last step of a row", 48, [](Problem<T>& p) {
    p.layout_a = exchanged_rows(128, 96);
    p.layout_b = exchanged_rows(128, 64);
  });
  run("64 bytes", 48, [](Problem<T>& p) {
    p.layout_a = exchanged_rows(64, 32);
    p.layout_b = exchanged_rows(64);
  });
  run("32 bytes of A", 48, [](Problem<T>& p) { p.layout_a = exchanged_rows(32); });
  run("nothing exchanged", 48, [](Problem<T>& p) {
    p.layout_a = {0, 0, 1024, 128};  // a column of 16 bytes after the other
    p.layout_b = {0, 0, 128, 512};   // eight rows after the other
  });
  run("rows of eight further apart", 48, [](Problem<T>& p) { p.layout_b.stride = 2048; });
  run("no sums before", 16, [](Problem<T>& p) {
    p.accumulate = false;
    p.before = std::is_same_v<T, int8_t> ? 1 << 30 : std::numeric_limits<float>::quiet_NaN();
  });
  if (sizeof(T) == 2) run("selector 1", 72, [](Problem<T>& p) { p.selector = 1; });
  tests.run("%s worked example", type, [] {
    emu::Random random(9);
    const Problem<T> p(32, emu::worked_example(64, Problem<T>::kDepth), random);
    if constexpr (sizeof(T) == 2) {
      emu::expect_words(p.metadata(), {{0, 0xED9C9C84}, {1, 0x9C8484ED}, {4, 0x4ED9D9C8}, {5, 0xD9C8C84E}});
    } else {
      emu::expect_words(p.metadata(), {{0, 0x84ED9C84}, {1, 0x9C84ED9C}, {6, 0xD9C84ED9}, {7, 0x4ED9C84E}});
    }
    p.expect(p.run());
  });
}

void values(emu::Tests& tests) {
  // one value of A against ones: all patterns of e4m3, as CUDA's own conversion has them
  tests.run("e4m3, every value", [] {
    emu::Random random(1);
    for (int first = 0; first < 256; first += 64) {
      Problem<__nv_fp8_e4m3> p(8, random);
      for (int i = 0; i < 64; ++i) {
        std::fill(p.a[i].begin(), p.a[i].end(), __nv_fp8_e4m3(0.f));
        p.a[i][3].__x = __nv_fp8_storage_t(first + i);
      }
      for (auto& row : p.b) std::fill(row.begin(), row.end(), __nv_fp8_e4m3(1.f));
      p.before = 0;
      p.expect(p.run());
    }
  });
  tests.run("f16, infinities and the smallest", [] {
    emu::Random random(2);
    Problem<__half> p(8, random);
    for (auto& row : p.b) std::fill(row.begin(), row.end(), __half(0.5f));
    for (auto& row : p.a) std::fill(row.begin(), row.end(), __half(0.f));
    p.a[3][0] = __ushort_as_half(0x7c00);
    p.a[4][1] = __ushort_as_half(0xfc00);
    p.a[5][2] = __ushort_as_half(0x7e00);
    p.a[6][5] = __ushort_as_half(0x0001);
    p.before = 0;
    p.expect(p.run());
  });
  tests.run("s8, sums that wrap", [] {
    emu::Random random(3);
    Problem<int8_t> p(8, random);
    for (auto& row : p.a) std::fill(row.begin(), row.end(), int8_t(-128));
    for (auto& row : p.b) std::fill(row.begin(), row.end(), int8_t(-128));
    p.before = 0x7fffffff;
    const auto d = p.run();
    emu::expect_equal(d, std::vector<int32_t>(d.size(), int32_t(0x7fffffffu + 32 * 128 * 128)));
  });
}

// Four steps of one tile in two groups, of which the second may be in flight while other accumulators are read.
__global__ void pipeline(Job job, const uint4* image, int chunks, const uint32_t* metadata, float* d) {
  const int t = threadIdx.x;
  auto shared = reinterpret_cast<uint4*>(ptx::dynamic_shared());
  for (int i = t; i < chunks; i += 128) shared[i] = image[i];
  emu::fence_proxy_async();
  __syncthreads();
  const uint64_t address = ptx::shared_address(shared) >> 4;
  const uint32_t word = metadata[t];
  float first[8], second[8];
  emu::wgmma_fence();
  const auto issue = [&](float* sums, bool accumulate) {
    emu::wgmma_sp(sums, 16, job.type, job.a + address, job.b + address, word, 0, accumulate);
  };
  issue(first, false);
  issue(second, false);
  issue(first, true);
  emu::wgmma_commit();
  issue(second, true);
  emu::wgmma_commit();
  emu::wgmma_wait(1);
  for (int i = 0; i < 8; ++i) d[t * 16 + i] = first[i];
  emu::wgmma_fence();
  issue(second, true);  // in flight: goes on
  issue(first, true);
  emu::wgmma_commit();
  emu::wgmma_commit();  // an empty group counts
  emu::wgmma_wait(1);
  for (int i = 0; i < 8; ++i) d[t * 16 + 8 + i] = second[i];
  emu::wgmma_wait(0);
  for (int i = 0; i < 8; ++i) d[t * 16 + i] += first[i];
}

// Two instructions whose accumulators overlap, but are not the same.
__global__ void overlap(Job job, int first, int second, int n, MatrixType type) {
  float sums[16] = {};
  uint32_t word = 0x44444444;
  const uint64_t address = ptx::shared_address(ptx::dynamic_shared()) >> 4;
  emu::wgmma_fence();
  emu::wgmma_sp(sums + first, 16, job.type, job.a + address, job.b + address, word, 0, false);
  emu::wgmma_sp(sums + second, n, type, job.a + address, job.b + address, word, 0, false);
  emu::wgmma_commit();
  emu::wgmma_wait(0);
}

void order(emu::Tests& tests) {
  tests.run("groups and accumulators in flight", [] {
    emu::Random random(4);
    const Problem<__half> p(16, random);
    const emu::Buffer<uint4> shared = p.image();
    emu::Buffer<float> d(64 * 32);
    emu::run(pipeline, 1, 128, shared.size() * 16, p.job(), shared.data(), int(shared.size()), p.metadata().data(),
             d.data());
    emu::Buffer<float> first(64 * 16), second(64 * 16);
    for (int i = 0; i < 64 * 16; ++i) first[i] = d[i / 8 * 16 + i % 8] + 3, second[i] = d[i / 8 * 16 + 8 + i % 8] + 3;
    p.expect(first, 5);  // 2 and then 3
    p.expect(second, 3);
  });
  tests.run("one after the other", [] {
    emu::Random random(12);
    Problem<__half> p(16, random);
    p.expect(p.run(Fault::again), 2);
    p.a_in_registers = true;
    p.expect(p.run(Fault::again), 2);
  });
  tests.run("accumulators of two shapes", [] {
    emu::Random random(5);
    const Problem<__half> p(16, random);
    const auto go = [&](int first, int second, int n, MatrixType type) {
      emu::run(overlap, 1, 128, p.image().size() * 16, p.job(), first, second, n, type);
    };
    go(0, 0, 16, MatrixType::f16);
    go(0, 8, 16, MatrixType::f16);
    go(8, 0, 16, MatrixType::f16);
    emu::expect_error("of another shape in flight", [&] { go(0, 0, 8, MatrixType::f16); });
    emu::expect_error("of another shape in flight", [&] { go(0, 7, 16, MatrixType::f16); });
    emu::expect_error("of another shape in flight", [&] { go(7, 0, 16, MatrixType::f16); });
    emu::expect_error("of another shape in flight", [&] { go(0, 0, 16, MatrixType::e4m3); });
  });
}

void faults(emu::Tests& tests) {
  const auto expect = [&](const char* name, Fault fault, const char* error, auto change) {
    tests.run("%s", name, [=] {
      emu::Random random(6);
      Problem<__half> p(16, random);
      change(p);
      emu::expect_error(error, [&] { p.expect(p.run(fault)); });
    });
  };
  const auto ss = [](Problem<__half>&) {};
  const auto rs = [](Problem<__half>& p) { p.a_in_registers = true; };
  expect("no fence", Fault::no_fence, "no wgmma_fence before the warpgroup's first", ss);
  expect("no fence between two", Fault::again_without_fence,
         "no wgmma_fence since the accumulators were last free to change", ss);
  expect("no fence between two with A in registers", Fault::again_without_fence,
         "no wgmma_fence since the registers of A were last free to change", rs);
  expect("A's registers change behind the fence", Fault::fragment_behind_fence,
         "no wgmma_fence since the registers of A were last free to change", rs);
  expect("no commit", Fault::no_commit, "ends with wgmmas that it never committed", ss);
  expect("no wait", Fault::no_wait, "ends with wgmmas that it never waited for", ss);
  expect("a wait for too little", Fault::waits_for_too_little, "ends with wgmmas that it never waited for", ss);
  expect("accumulators read in flight", Fault::reads_sums, "nan times the bound", ss);
  expect("accumulators written in flight", Fault::writes_sums, "accumulators of thread 5 overwritten in flight", ss);
  expect("metadata written in flight", Fault::writes_metadata,
         "the metadata register of thread 6 overwritten in flight", ss);
  expect("A's registers written in flight", Fault::writes_fragment,
         "registers of A of thread 100 overwritten in flight", rs);
  expect("shared memory written in flight", Fault::writes_shared, emu::memory::kChecked ? "data race" : "wrong", ss);
  if (emu::memory::kChecked) expect("no proxy fence", Fault::no_proxy_fence, "no fence.proxy.async", ss);
  expect("descriptors that differ", Fault::other_descriptor, "threads 0 and 77 pass different operands", ss);
  expect("selectors that differ", Fault::other_selector, "threads 0 and 64 pass different operands", ss);
  expect("less shared memory than an operand takes", Fault::too_little_shared, "wgmma's B: the shared address", ss);
  expect("a warp that is missing", Fault::fourth_warp_missing, "deadlock", ss);
  expect("a warp at another instruction", Fault::other_instruction, "the warpgroup diverges", ss);
  tests.run("fewer threads than a warpgroup", [] {
    emu::Random random(7);
    const Problem<__half> p(16, random);
    emu::expect_error("fewer than 128 threads", [&] { p.run(p.job(), p.metadata(), Fault::none, 96); });
  });
  tests.run("metadata that means nothing", [] {
    emu::Random random(8);
    const Problem<__half> p(16, random);
    const Problem<int8_t> q(16, random);
    for (const uint32_t nibble : {0x0, 0x1, 0x2, 0x3, 0x5, 0x6, 0x7, 0xa, 0xb, 0xf})
      for (const int shift : {0, 12, 16, 28}) {
        auto words = p.metadata(), bytes = q.metadata();
        words[105] = (words[105] & ~(15u << shift)) | nibble << shift;
        bytes[34] = (bytes[34] & ~(15u << shift)) | nibble << shift;
        emu::expect_error("the metadata of thread 105", [&] { p.run(p.job(), words); });
        emu::expect_error("the metadata of thread 34", [&] { q.run(q.job(), bytes); });
      }
  });
  tests.run("descriptors that are not emulated", [] {
    emu::Random random(9);
    const Problem<__half> p(16, random);
    const auto expect = [&](const char* error, uint64_t a, uint64_t b) {
      Job job = p.job();
      job.a ^= a;
      job.b ^= b;
      emu::expect_error(error, [&] { p.run(job, p.metadata()); });
    };
    const Job plain = p.job();
    expect("A has a base offset", 1ull << 49, 0);
    expect("B has a base offset", 0, 1ull << 51);
    for (const int bit : {14, 15, 30, 31, 46, 48, 52, 61}) expect("bits that mean nothing", 0, 1ull << bit);
    expect("begins at", 128 >> 4, 0);  // the second row of the pattern
    expect("begins at", 0, 512 >> 4);
    expect("are more than its 128", 112 >> 4, 0);
    expect("are more than its 128", 0, 80 >> 4);
    expect("are more than its 32", 0, plain.b ^ descriptor(p.kBaseOfB, exchanged_rows(32)));
    expect("no multiple of 1024", 0, uint64_t(512 >> 4) << 32);
    expect("lies outside", 0, plain.b ^ descriptor(128 << 10, p.layout_b));
    expect("lies outside", plain.a ^ descriptor(0, {128, 0, 16, 32 << 10}), 0);
    Job unused = plain;
    unused.a ^= 5 << 16;  // rows that are exchanged have no use for it
    p.expect(p.run(unused, p.metadata()));
  });
  tests.run("shapes that there are not", [] {
    emu::Random random(10);
    const Problem<__half> p(16, random);
    const Problem<int8_t> q(16, random);
    const auto expect = [&](const char* error, const auto& problem, int n, int selector) {
      Job job = problem.job();
      job.n = n;
      job.selector = selector;
      emu::expect_error(error, [&] { problem.run(job, problem.metadata()); });
    };
    for (const int n : {0, 4, 12, 264}) expect("there is none of", p, n, 0);
    for (const int n : {40, 56, 248}) expect("there is none of", q, n, 0);
    expect("the selector is 2", p, 16, 2);
    expect("the selector is 1", q, 16, 1);
  });
}

void speed(emu::Tests& tests) {
  tests.run("f16 m64n256, a hundred", [] {
    emu::Random random(11);
    const Problem<__half> p(256, random);
    for (int i = 0; i < 100; ++i) p.run();
  });
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  layouts<__half>(tests, "f16");
  layouts<__nv_bfloat16>(tests, "bf16");
  layouts<__nv_fp8_e4m3>(tests, "e4m3");
  layouts<int8_t>(tests, "s8");
  values(tests);
  order(tests);
  faults(tests);
  speed(tests);
  return tests.result();
}
