// The emulated instructions against the documents: fragment layouts, metadata, zero fill, addresses.
#include "cuda/ptx.cuh"
#include "reference_matrices.h"
#include "test_support.h"

using namespace sparseops;
using emu::a16, emu::a8, emu::b16, emu::b8, emu::d32, emu::Place, emu::fragment;
using emu::Matrix, emu::matrix, emu::Sparse, emu::random_matrix;

namespace {

template <class D, class Sum>
void expect_accumulated(const emu::Buffer<D>& d, const Matrix<Sum>& sum, D before) {
  std::vector<double> got, expected;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Place place = d32(lane, i);
      got.push_back(double(d[4 * lane + i]));
      expected.push_back(double(sum[place.row][place.column]) + double(before));
    }
  emu::expect_within(got, expected, std::vector<double>(got.size(), std::is_integral_v<D> ? 0. : 32.), 0);
}

template <class T>
__global__ void dense_mma(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[4 * threadIdx.x + i], rd[i] = d[4 * threadIdx.x + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[2 * threadIdx.x + i];
  ptx::mma_m16n8k16<T>(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[4 * threadIdx.x + i] = rd[i];
}

// T is the type of a and b; selector is ignored for bytes.
template <class T, class D, int selector>
__global__ void sparse_mma(const uint32_t* a, const uint32_t* b, const uint32_t* metadata, D* d) {
  uint32_t ra[4], rb[4];
  D rd[4];
  for (int i = 0; i < 4; ++i) {
    ra[i] = a[4 * threadIdx.x + i];
    rb[i] = b[4 * threadIdx.x + i];
    rd[i] = d[4 * threadIdx.x + i];
  }
  if constexpr (sizeof(T) == 1)
    ptx::mma_sp_m16n8k64(rd, ra, rb, metadata[threadIdx.x]);
  else
    ptx::mma_sp_m16n8k32<T, selector>(rd, ra, rb, metadata[threadIdx.x]);
  for (int i = 0; i < 4; ++i) d[4 * threadIdx.x + i] = rd[i];
}

template <class T>
void dense(emu::Random& random) {
  const auto a = random_matrix<T>(16, 16, random), b = random_matrix<T>(16, 8, random);
  emu::Buffer<float> d(128, 0.5f);
  emu::run(dense_mma<T>, 1, 32, 0, fragment(a, 4, a16).data(), fragment(b, 2, b16).data(), d.data());
  auto sum = matrix<double>(16, 8);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j)
      for (int k = 0; k < 16; ++k) sum[i][j] += emu::to_double(a[i][k]) * emu::to_double(b[k][j]);
  expect_accumulated(d, sum, 0.5f);
}

template <class T, int selector>
void sparse16(const Sparse& s, const emu::Buffer<uint32_t>& metadata, emu::Random& random) {
  const auto a = random_matrix<T>(16, 16, random), b = random_matrix<T>(32, 8, random);
  emu::Buffer<float> d(128, 0.5f);
  emu::run(sparse_mma<T, float, selector>, 1, 32, 0, fragment(a, 4, a16).data(), fragment(b, 4, b16).data(),
           metadata.data(), d.data());
  expect_accumulated(d, product<double>(s, a, b), 0.5f);
}

void sparse8(const Sparse& s, const emu::Buffer<uint32_t>& metadata, emu::Random& random) {
  const auto a = random_matrix<int8_t>(16, 32, random), b = random_matrix<int8_t>(64, 8, random);
  emu::Buffer<int32_t> d(128, 7);
  emu::run(sparse_mma<int8_t, int32_t, 0>, 1, 32, 0, fragment(a, 4, a8).data(), fragment(b, 4, b8).data(),
           metadata.data(), d.data());
  expect_accumulated(d, product<int64_t>(s, a, b), 7);
}

template <class T>
void matrices(emu::Tests& tests, const char* type) {
  constexpr uint32_t kInvalid = 0xffffffff;  // in the lanes that must not matter
  tests.run("%s dense m16n8k16", type, [] {
    emu::Random random(1);
    dense<T>(random);
  });
  tests.run("%s sparse m16n8k32, worked example", type, [] {
    emu::Random random(2);
    const Sparse s = emu::worked_example(16, 32);
    const auto metadata = metadata16(s, 0, kInvalid);
    expect_words(metadata, {{0, 0xED9C9C84}, {1, 0x9C8484ED}, {4, 0x4ED9D9C8}, {5, 0xD9C8C84E}});
    sparse16<T, 0>(s, metadata, random);
    sparse16<T, 1>(s, metadata16(s, 1, kInvalid), random);
  });
  tests.run("%s sparse m16n8k32, random", type, [] {
    emu::Random random(3);
    for (int i = 0; i < 20; ++i) {
      const Sparse s = random_pattern(16, 32, random);
      sparse16<T, 0>(s, metadata16(s, 0, kInvalid), random);
      sparse16<T, 1>(s, metadata16(s, 1, kInvalid), random);
    }
  });
  tests.run("%s sparse m16n8k32, the other selector", type, [] {
    emu::Random random(4);
    const Sparse s = random_pattern(16, 32, random);
    emu::expect_error("is not two rising columns", [&] { sparse16<T, 0>(s, metadata16(s, 1, kInvalid), random); });
    emu::expect_error("wrong", [&] { sparse16<T, 0>(s, metadata16(s, 1, 0x44444444), random); });
  });
  tests.run("%s sparse m16n8k32, metadata that means nothing", type, [] {
    emu::Random random(5);
    const Sparse s = random_pattern(16, 32, random);
    for (const uint32_t nibble : {0x0, 0x1, 0x2, 0x3, 0x5, 0x6, 0x7, 0xa, 0xb, 0xf})
      for (const int shift : {0, 12, 16, 28}) {
        auto metadata = metadata16(s, 0, kInvalid);
        metadata[9] = (metadata[9] & ~(15u << shift)) | nibble << shift;
        emu::expect_error("the metadata of lane 9", [&] { sparse16<T, 0>(s, metadata, random); });
      }
  });
}

void bytes(emu::Tests& tests) {
  tests.run("s8 sparse m16n8k64, worked example", [] {
    emu::Random random(6);
    const Sparse s = emu::worked_example(16, 64);
    const auto metadata = metadata8(s);
    expect_words(metadata, {{0, 0x84ED9C84},
                            {1, 0x9C84ED9C},
                            {2, 0x9C84ED9C},
                            {3, 0xED9C84ED},
                            {4, 0xC84ED9C8},
                            {5, 0xD9C84ED9},
                            {6, 0xD9C84ED9},
                            {7, 0x4ED9C84E}});
    sparse8(s, metadata, random);
  });
  tests.run("s8 sparse m16n8k64, random", [] {
    emu::Random random(7);
    for (int i = 0; i < 20; ++i) {
      const Sparse s = random_pattern(16, 64, random);
      sparse8(s, metadata8(s), random);
    }
  });
  tests.run("s8 sparse m16n8k64, metadata that means nothing", [] {
    emu::Random random(8);
    const Sparse s = random_pattern(16, 64, random);
    auto metadata = metadata8(s);
    metadata[30] &= ~0xfu;
    emu::expect_error("the metadata of lane 30", [&] { sparse8(s, metadata, random); });
  });
}

// ---- ldmatrix

template <bool transposed>
__global__ void load_matrices(const uint16_t* in, uint32_t* out, int skew) {
  auto tile = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  for (int i = threadIdx.x; i < 256; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4<transposed>(r, ptx::shared_address(tile) + threadIdx.x * 16 + skew);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

__global__ void load_matrices_of_a_variable(const uint16_t* in, uint32_t* out) {
  alignas(16) __shared__ uint16_t tile[256];
  for (int i = threadIdx.x; i < 256; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(tile + threadIdx.x * 8));
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

__global__ void load_matrices_at(uint32_t address) {
  uint32_t r[4];
  ptx::ldmatrix_x4(r, address);
}

__global__ void address_of(const void* pointer) { ptx::shared_address(pointer); }

void loads(emu::Tests& tests) {
  emu::Buffer<uint16_t> in(256);
  for (int i = 0; i < 256; ++i) in[i] = uint16_t(1000 + i);
  emu::Buffer<uint32_t> out(128);
  const auto expect_loaded = [&](bool transposed) {
    std::vector<uint32_t> expected(128);
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int half = 0; half < 2; ++half) {
          const int g = lane / 4, pair = lane % 4 * 2 + half;
          const int row = transposed ? pair : g, column = transposed ? g : pair;
          expected[4 * lane + m] |= uint32_t(1000 + m * 64 + row * 8 + column) << 16 * half;
        }
    emu::expect_equal(out, expected);
  };
  tests.run("ldmatrix, plain", [&] {
    emu::run(load_matrices<false>, 1, 32, 512, in.data(), out.data(), 0);
    expect_loaded(false);
  });
  tests.run("ldmatrix, transposed", [&] {
    emu::run(load_matrices<true>, 1, 32, 512, in.data(), out.data(), 0);
    expect_loaded(true);
  });
  tests.run("ldmatrix of a __shared__ variable", [&] {
    emu::run(load_matrices_of_a_variable, 1, 32, 0, in.data(), out.data());
    expect_loaded(false);
  });
  tests.run("ldmatrix at a wrong address", [&] {
    emu::expect_error("ldmatrix: the shared address",
                      [&] { emu::run(load_matrices<false>, 1, 32, 528, in.data(), out.data(), 8); });
    emu::expect_error("lies outside the 512 bytes",
                      [&] { emu::run(load_matrices<false>, 1, 32, 512, in.data(), out.data(), 16); });
    emu::expect_error("lies outside", [&] { emu::run(load_matrices_at, 1, 32, 512, 0u); });
  });
  tests.run("a shared address of what is not shared", [&] {
    emu::expect_error("does not lie in shared memory", [&] {
      const std::vector<int> elsewhere(1 << 20);
      emu::run(address_of, 1, 1, 64, static_cast<const void*>(elsewhere.data()));
    });
  });
}

// ---- cp.async, ld.global.nc

template <int size>
__global__ void copy(const unsigned char* in, unsigned char* out, int stride, uint32_t src_bytes, int skew) {
  unsigned char* tile = ptx::dynamic_shared();
  ptx::cp_async<size>(ptx::shared_address(tile) + threadIdx.x * size + skew, in + threadIdx.x * stride, src_bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < size; ++i) out[threadIdx.x * size + i] = tile[threadIdx.x * size + skew + i];
}

// Three groups of copies, of which the last may still be on its way.
__global__ void copy_groups(const uint4* in, uint4* out) {
  uint4* tile = reinterpret_cast<uint4*>(ptx::dynamic_shared());
  for (int group = 0; group < 3; ++group) {
    ptx::cp_async<16>(ptx::shared_address(tile + group), in + group, 16);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  out[0] = tile[0];
  out[1] = tile[1];
  ptx::cp_async_wait<0>();
  out[2] = tile[2];
}

__global__ void copy_without_wait(const uint4* in) {
  ptx::cp_async<16>(ptx::shared_address(ptx::dynamic_shared()), in, 16);
  ptx::cp_async_commit();
}

__global__ void stream(const void* in, uint4* out) { *out = ptx::load_streaming(in); }

template <int size>
void copies(emu::Tests& tests) {
  tests.run("cp.async of %d bytes", size, [] {
    emu::Random random(size);
    const auto in = random.normal<unsigned char>(32 * size);
    for (uint32_t src_bytes = 0; src_bytes <= size; ++src_bytes) {
      emu::Buffer<unsigned char> out(32 * size);
      emu::run(copy<size>, 1, 32, 32 * size, in.data(), out.data(), size, src_bytes, 0);
      std::vector<unsigned char> expected(32 * size);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] = i % size < src_bytes ? in[i] : 0;
      emu::expect_equal(out, expected);
    }
  });
  tests.run("cp.async of %d bytes, wrongly asked for", size, [] {
    emu::Buffer<unsigned char> in(32 * size), out(32 * size);
    const auto go = [&](int shift, int stride, uint32_t src_bytes, int skew) {
      emu::run(copy<size>, 1, 32, 33 * size, in.data() + shift, out.data(), stride, src_bytes, skew);
    };
    go(0, size, size, size);
    emu::expect_error("source bytes", [&] { go(0, size, size + 1, 0); });
    emu::expect_error("the global address", [&] { go(1, 0, 1, 0); });
    emu::expect_error("the shared address", [&] { go(0, size, size, 1); });
    emu::expect_error("lies outside", [&] { go(0, size, size, 2 * size); });
    emu::expect_error("outside every global buffer", [&] { go(size, size, size, 0); });
    emu::expect_error("outside every global buffer", [&] { go(size, size, 0, 0); });
  });
}

void background(emu::Tests& tests) {
  copies<4>(tests);
  copies<8>(tests);
  copies<16>(tests);
  emu::Buffer<uint4> in(3), out(3);
  for (unsigned i = 0; i < 3; ++i) in[i] = {i, i + 10, i + 20, i + 30};
  tests.run("cp.async groups arrive in order", [&] {
    emu::run(copy_groups, 1, 1, 48, in.data(), out.data());
    emu::expect_equal(out, std::vector<uint4>{in[0], in[1], in[2]});
  });
  tests.run("cp.async never waited for",
            [&] { emu::expect_error("never waited for", [&] { emu::run(copy_without_wait, 1, 1, 16, in.data()); }); });
  tests.run("ld.global.nc", [&] {
    emu::run(stream, 1, 1, 0, static_cast<const void*>(&in[2]), out.data());
    emu::expect_equal_bytes(out.data(), &in[2], 1, 16);
    emu::expect_error("outside every",
                      [&] { emu::run(stream, 1, 1, 0, static_cast<const void*>(&in[3]), out.data()); });
    const auto shifted = reinterpret_cast<const char*>(in.data()) + 8;
    emu::expect_error("no multiple of 16",
                      [&] { emu::run(stream, 1, 1, 0, static_cast<const void*>(shifted), out.data()); });
  });
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  matrices<__half>(tests, "f16");
  matrices<__nv_bfloat16>(tests, "bf16");
  bytes(tests);
  loads(tests);
  background(tests);
  return tests.result();
}
