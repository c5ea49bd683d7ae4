// The emulated copy engine's stores against naive loops, and stmatrix, which fills what a store takes.
#include "cuda/ptx.cuh"
#include "ptx_sm90_emulation.h"
#include "reference_tensors.h"

using namespace sparseops;
using emu::At, emu::Box, emu::box_of, emu::Bytes, emu::encode, emu::in_shared, emu::Tensor;

namespace {

enum class Fault { none, no_wait, no_commit, waits_for_too_little, no_read_wait, reads_early, no_proxy_fence };

// Writes the box that `image` holds in the order of shared memory, and destroys it once it was read.
__global__ void store_box(const CUtensorMap map, At at, int rank, const unsigned char* image, uint32_t bytes,
                          const unsigned char* written, unsigned char* seen, Fault fault) {
  unsigned char* shared = ptx::dynamic_shared();
  for (uint32_t i = threadIdx.x; i < bytes; i += 32) shared[i] = image[i];
  if (fault != Fault::no_proxy_fence) emu::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  emu::tma_store(&map, ptx::shared_address(shared), at.c, rank);
  if (fault == Fault::no_commit) return;
  emu::bulk_commit();
  if (fault == Fault::no_wait) return;
  if (fault == Fault::waits_for_too_little) return emu::bulk_wait_read(1);
  if (fault != Fault::no_read_wait) emu::bulk_wait_read(0);
  for (uint32_t i = 0; i < bytes; ++i) shared[i] = 0x55;
  if (fault != Fault::reads_early) emu::bulk_wait(0);
  if (written) seen[0] = written[0];
}

// Groups are done in their order.
__global__ void store_groups(const CUtensorMap map, const unsigned char* image) {
  unsigned char* shared = ptx::dynamic_shared();
  const uint32_t address = ptx::shared_address(shared);
  for (int i = 0; i < 384; ++i) shared[i] = image[i];
  emu::fence_proxy_async();
  for (int group = 0; group < 3; ++group) {
    const int at[] = {0, group};
    emu::tma_store(&map, address + 128 * group, at, 2);
    emu::bulk_commit();
  }
  emu::bulk_wait_read(1);
  for (int i = 0; i < 256; ++i) shared[i] = 0x55;
  emu::bulk_wait_read(0);
}

void store(Tensor& tensor, const Box& box, const std::vector<int>& at, Fault fault = Fault::none) {
  emu::Random random(1);
  const auto bytes = uint32_t(box.elements() * tensor.element);
  const auto image = random.normal<unsigned char>(bytes);
  Bytes expected(tensor.data.data(), tensor.data.data() + tensor.data.size());
  const unsigned char* first = nullptr;
  box.for_each(at, [&](int64_t index, const std::vector<int64_t>& c) {
    if (!tensor.holds(c)) return;
    if (!first) first = tensor[c];
    std::memcpy(&expected[tensor.offset(c)], image.data() + in_shared(index, tensor.element, box.span), tensor.element);
  });
  emu::Buffer<unsigned char> seen(1);
  emu::run(store_box, 1, 32, bytes, encode(tensor, box), At(at), int(at.size()), image.data(), bytes, first,
           seen.data(), fault);
  emu::expect_equal(tensor.data, expected);
  if (first) emu::expect_equal(seen, Bytes{expected[first - tensor.data.data()]});
}

void stores(emu::Tests& tests) {
  for (const int span : {0, 32, 64, 128})
    tests.run("store of two dimensions, span %d", span, [=] {
      emu::Random random(span);
      Tensor tensor(2, {100, 21}, random, 8);
      const int64_t row = (span ? span : 48) / 2;
      store(tensor, box_of({row, 8}, span), {0, 0});
      store(tensor, box_of({row, 8}, span), {8, 16});   // clipped at the last row
      store(tensor, box_of({row, 8}, span), {97, 3});   // and the last column
      store(tensor, box_of({row, 8}, span), {100, 0});  // nothing of it inside
    });
  tests.run("stores of one to five dimensions", [] {
    emu::Random random(11);
    Tensor line(4, {50}, random), cube(1, {40, 5, 3}, random), four(8, {6, 3, 2, 3}, random),
        five(2, {16, 3, 2, 2, 3}, random);
    store(line, box_of({16}), {40});
    store(cube, box_of({32, 2, 2}), {16, 4, 1});
    store(four, box_of({4, 2, 2, 2}), {1, 2, 1, 0});
    store(five, box_of({8, 2, 2, 2, 2}), {4, 0, 1, 1, 2});
    store(cube, {{16, 4, 3}, {1, 2, 2}, 0}, {0, 1, 0});
  });
  tests.run("groups of stores", [] {
    emu::Random random(12);
    Tensor tensor(1, {128, 3}, random);
    const auto image = random.normal<unsigned char>(384);
    emu::run(store_groups, 1, 1, 384, encode(tensor, box_of({128, 1})), image.data());
    emu::expect_equal(tensor.data, Bytes(image.data(), image.data() + 384));
  });
  const auto expect = [&](const char* name, Fault fault, const char* error) {
    tests.run("%s", name, [=] {
      emu::Random random(13);
      Tensor tensor(2, {64, 8}, random);
      emu::expect_error(error, [&] { store(tensor, box_of({64, 8}, 128), {0, 0}, fault); });
    });
  };
  const bool races = emu::memory::kChecked;
  expect("store never committed", Fault::no_commit, "ends with bulk stores that it never committed");
  expect("store never waited for", Fault::no_wait, "ends with bulk stores that may not yet have read");
  expect("store waited for too little", Fault::waits_for_too_little,
         "ends with bulk stores that may not yet have read");
  expect("store's source overwritten", Fault::no_read_wait, races ? "data race" : "wrong");
  expect("store's result read early", Fault::reads_early, races ? "data race" : "wrong");
  if (races) expect("store without a proxy fence", Fault::no_proxy_fence, "no fence.proxy.async");
  tests.run("stores that are asked for wrongly", [] {
    emu::Random random(16);
    Tensor tensor(2, {64, 8}, random);
    emu::expect_error("coordinate 1 is -1", [&] { store(tensor, box_of({64, 8}, 128), {0, -1}); });
    tensor.size[1] = 9;
    emu::Buffer<unsigned char> image(2048, 0), seen(1);
    emu::expect_error("outside every global buffer", [&] {
      emu::run(store_box, 1, 32, 2048, encode(tensor, box_of({64, 9})), At({0, 0}), 2, image.data(), 1152u, nullptr,
               seen.data(), Fault::none);
    });
  });
}

// ---- stmatrix

template <int count, bool transposed>
__global__ void store_matrices(const uint32_t* in, uint16_t* out, uint32_t skew) {
  auto tile = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  uint32_t r[4];
  for (int i = 0; i < count; ++i) r[i] = in[threadIdx.x * count + i];
  // rows in reverse; addresses behind those that count mean nothing
  const uint32_t row = ptx::shared_address(tile) + (count * 8 - 1 - threadIdx.x) * 16 + skew;
  emu::stmatrix(row, r, count, transposed);
  __syncwarp();
  for (int i = threadIdx.x; i < count * 64; i += 32) out[i] = tile[i];
}

// A lane may read what it gave itself; for what another gave, they must meet first.
__global__ void read_matrix(uint32_t* out, int of_neighbour) {
  auto tile = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  const uint32_t r[1] = {threadIdx.x};
  emu::stmatrix(ptx::shared_address(tile) + threadIdx.x % 8 * 16, r, 1, false);
  out[threadIdx.x] = tile[threadIdx.x ^ of_neighbour];
}

template <int count, bool transposed>
void matrices(emu::Tests& tests) {
  tests.run("stmatrix x%d%s", count, transposed ? ", transposed" : "", [] {
    emu::Random random(count);
    emu::Buffer<uint32_t> in(32 * count);
    for (size_t i = 0; i < in.size(); ++i) in[i] = uint32_t(random.below(1ull << 32));
    emu::Buffer<uint16_t> out(64 * count);
    emu::run(store_matrices<count, transposed>, 1, 32, 128 * count, in.data(), out.data(), 0u);
    std::vector<uint16_t> expected(64 * count);
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < count; ++m)
        for (int half = 0; half < 2; ++half) {
          const int g = lane / 4, pair = lane % 4 * 2 + half;
          const int row = transposed ? pair : g, column = transposed ? g : pair;
          expected[(count * 8 - 1 - (8 * m + row)) * 8 + column] = uint16_t(in[lane * count + m] >> 16 * half);
        }
    emu::expect_equal(out, expected);
    emu::expect_error("stmatrix: the shared address", [&] {
      emu::run(store_matrices<count, transposed>, 1, 32, 256 * count, in.data(), out.data(), 8u);
    });
    emu::expect_error("lies outside", [&] {
      emu::run(store_matrices<count, transposed>, 1, 32, 128 * count, in.data(), out.data(), 16u);
    });
  });
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  stores(tests);
  if (emu::memory::kChecked)
    tests.run("stmatrix orders nothing", [] {
      emu::Buffer<uint32_t> out(32);
      emu::run(read_matrix, 1, 32, 128, out.data(), 0);
      emu::expect_error("data race", [&] { emu::run(read_matrix, 1, 32, 128, out.data(), 1); });
    });
  matrices<1, false>(tests);
  matrices<2, false>(tests);
  matrices<4, false>(tests);
  matrices<1, true>(tests);
  matrices<2, true>(tests);
  matrices<4, true>(tests);
  return tests.result();
}
