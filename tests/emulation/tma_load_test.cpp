// The emulated copy engine's loads against naive loops: boxes of tensors, pixels of images, multicast.
#include "cuda/ptx.cuh"
#include "ptx_sm90_emulation.h"
#include "reference_tensors.h"

using namespace sparseops;
using emu::At, emu::Box, emu::box_of, emu::Bytes, emu::encode, emu::in_shared, emu::swizzle_of, emu::Tensor,
    emu::type_of;

namespace {

// ---- loads

// Shared memory from `dst` on, once `bytes` have come there; what is behind them stays.
__global__ void load_box(const CUtensorMap map, At at, int rank, uint32_t dst, uint32_t bytes, unsigned char* out) {
  unsigned char* shared = ptx::dynamic_shared();
  const uint32_t bar = ptx::shared_address(shared), to = bar + dst;
  for (uint32_t i = threadIdx.x; i < 16; i += 32) shared[dst + bytes + i] = 0x77;
  if (threadIdx.x == 0) {
    emu::prefetch_tensormap(&map);
    emu::mbarrier_init(bar, 1);
    emu::fence_mbarrier_init();
    emu::mbarrier_arrive_expect_tx(bar, bytes);
    emu::tma_load(to, &map, bar, at.c, rank, 0);
  }
  __syncthreads();
  emu::mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < bytes + 16; i += 32) out[i] = shared[dst + i];
}

void load(Tensor& tensor, const Box& box, const std::vector<int>& at, uint32_t dst = 1024) {
  const auto bytes = uint32_t(box.elements() * tensor.element);
  emu::Buffer<unsigned char> out(bytes + 16);
  emu::run(load_box, 1, 32, dst + bytes + 16, encode(tensor, box), At(at), int(at.size()), dst, bytes, out.data());
  Bytes expected(bytes + 16, 0);
  std::fill(expected.begin() + bytes, expected.end(), 0x77);
  box.for_each(at, [&](int64_t index, const std::vector<int64_t>& c) {
    if (tensor.holds(c)) std::memcpy(&expected[in_shared(index, tensor.element, box.span)], tensor[c], tensor.element);
  });
  emu::expect_equal(out, expected);
}

void tiles(emu::Tests& tests) {
  for (const int span : {0, 32, 64, 128})
    for (const int element : {1, 2, 4, 8})
      tests.run("tile of two dimensions, span %d, element %d", span, element, [=] {
        emu::Random random(span + element);
        Tensor tensor(element, {200 / element, 37}, random, 24);
        const int64_t row = (span ? span : 48) / element;
        load(tensor, box_of({row, 40}, span), {0, 0});
        load(tensor, box_of({row, 9}, span), {16 / element, 5});
        load(tensor, box_of({row, 9}, span), {1, 30});   // beyond the last row, and at no multiple of 16 bytes
        load(tensor, box_of({row, 9}, span), {-3, -4});  // before the first
        load(tensor, box_of({row, 3}, span), {int(200 / element - 2), 36});
        load(tensor, box_of({row, 3}, span), {0, 37});  // nothing of it inside
        load(tensor, box_of({row, 3}, span), {int(200 / element), 0});
        load(tensor, box_of({row, 3}, span), {-int(row), 0});
      });
  tests.run("tiles of one to five dimensions", [] {
    emu::Random random(5);
    for (int i = 0; i < 60; ++i) {
      const int rank = 1 + i % 5, element = 1 << i / 5 % 4, span = i % 3 ? 0 : 32;
      std::vector<int64_t> size, extent, step;
      std::vector<int> at;
      for (int d = 0; d < rank; ++d) {
        size.push_back(1 + random.below(d ? 6 : 40));
        extent.push_back(d ? 1 + random.below(5) : (span ? span : 16 * (1 + random.below(2))) / element);
        step.push_back(d ? 1 + random.below(3) : 1);
        at.push_back(int(random.below(size[d] + 5)) - 3);
      }
      Tensor tensor(element, size, random, 16 * int(random.below(2)));
      load(tensor, {extent, step, span}, at);
    }
  });
  tests.run("a weight's columns as a third dimension", [] {
    emu::Random random(6);
    Tensor x(2, {64, 50, 3}, random);
    x.stride = {2, 3 * 128, 128};  // [50][3 * 64], in boxes as wide as what is exchanged
    load(x, box_of({64, 16, 2}, 128), {0, 40, 1});
    load(x, box_of({64, 16, 3}, 128), {0, 8, 0});
  });
}

// ---- im2col

struct Image {
  int batch, height, width, channels;
  int kernel, stride, pad, dilation;  // of both axes; along w, one less padding
  int pad_w() const { return pad ? pad - 1 : 0; }
  int extent() const { return (kernel - 1) * dilation; }
  int out_height() const { return (height + 2 * pad - extent() - 1) / stride + 1; }
  int out_width() const { return (width + 2 * pad_w() - extent() - 1) / stride + 1; }
};

CUtensorMap encode(Tensor& x, const Image& image, int channels, int pixels, int span) {
  const int lower[] = {-image.pad_w(), -image.pad};
  const int upper[] = {image.pad_w() - image.extent(), image.pad - image.extent()};
  cuuint64_t size[4], strides[4];
  const cuuint32_t steps[] = {1, cuuint32_t(image.stride), cuuint32_t(image.stride), 1};
  for (int d = 0; d < 4; ++d) size[d] = cuuint64_t(x.size[d]), strides[d] = cuuint64_t(x.stride[d]);
  CUtensorMap map;
  if (cuTensorMapEncodeIm2col(&map, type_of(x.element), 4, x.data.data(), size, strides + 1, lower, upper,
                              cuuint32_t(channels), cuuint32_t(pixels), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                              swizzle_of(span), CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
    throw emu::Error("the map was refused");
  return map;
}

__global__ void load_pixels(const CUtensorMap map, At at, uint16_t offset_w, uint16_t offset_h, uint32_t bytes,
                            unsigned char* out) {
  unsigned char* shared = ptx::dynamic_shared();
  const uint32_t bar = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    emu::mbarrier_init(bar, 1);
    emu::fence_mbarrier_init();
    emu::mbarrier_arrive_expect_tx(bar, bytes);
    emu::tma_load_im2col(bar + 1024, &map, bar, {at.c[0], at.c[1], at.c[2], at.c[3]}, offset_w, offset_h, 0);
  }
  __syncthreads();
  emu::mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < bytes; i += 32) out[i] = shared[1024 + i];
}

// `pixels` output pixels from the `first` on, as a convolution asks for them at tap (r, s).
void gather(Tensor& x, const Image& image, int span, int first, int pixels, int r, int s, int c) {
  const int channels = span / x.element, p = image.out_height(), q = image.out_width();
  const auto bytes = uint32_t(pixels * span);
  const auto base = [&](int pixel) {
    return std::vector<int>{c, pixel % q * image.stride - image.pad_w(), pixel / q % p * image.stride - image.pad,
                            pixel / (p * q)};
  };
  emu::Buffer<unsigned char> out(bytes);
  emu::run(load_pixels, 1, 32, 1024 + bytes, encode(x, image, channels, pixels, span), At(base(first)),
           uint16_t(s * image.dilation), uint16_t(r * image.dilation), bytes, out.data());
  Bytes expected(bytes, 0);
  for (int i = 0; i < pixels; ++i) {
    const auto at = base(first + i);
    for (int k = 0; k < channels; ++k) {
      const std::vector<int64_t> element = {c + k, at[1] + s * image.dilation, at[2] + r * image.dilation, at[3]};
      if (x.holds(element)) std::memcpy(&expected[in_shared(i * channels + k, x.element, span)], x[element], x.element);
    }
  }
  emu::expect_equal(out, expected);
}

void images(emu::Tests& tests) {
  const Image kImages[] = {{2, 5, 6, 64, 3, 1, 1, 1}, {1, 7, 4, 64, 1, 1, 0, 1},  {3, 9, 8, 128, 3, 2, 1, 1},
                           {2, 8, 9, 64, 3, 1, 2, 2}, {2, 10, 7, 64, 2, 3, 0, 1}, {1, 9, 9, 64, 5, 2, 3, 2},
                           {2, 12, 5, 72, 3, 1, 0, 1}};
  int number = 0;
  for (const Image& image : kImages)
    tests.run("im2col of image %d", number++, [=] {
      emu::Random random(number);
      Tensor x(2, {image.channels, image.width, image.height, image.batch}, random);
      const int all = image.out_width() * image.out_height() * image.batch;
      for (int r = 0; r < image.kernel; ++r)
        for (int s = 0; s < image.kernel; ++s)
          for (int first = 0; first < all + 8; first += 40)  // the last pixels lie beyond the last image
            gather(x, image, 128, first, 40, r, s, (r + s) % 2 * (image.channels - 64));
      gather(x, image, 64, 1, 33, 0, 0, 16);
      gather(x, image, 32, all - 1, 9, 0, 0, image.channels - 8);  // channels beyond the last
    });
}

// ---- multicast, bulk loads

// Each block of a cluster of two asks for its half of the rows for both; block 1's own rows come to itself alone too.
__global__ void load_for_both(const CUtensorMap map, const unsigned char* row, uint32_t half, unsigned char* out) {
  unsigned char* shared = ptx::dynamic_shared();
  const uint32_t bar = ptx::shared_address(shared), to = bar + 1024, rank = emu::cluster_rank();
  if (threadIdx.x == 0) {
    emu::mbarrier_init(bar, 1);
    emu::fence_mbarrier_init();
    emu::mbarrier_arrive_expect_tx(bar, 2 * half + 64);
  }
  emu::cluster_arrive();
  emu::cluster_wait();
  if (threadIdx.x == 0) {
    const int at[] = {0, int(rank * half / 128)};
    emu::tma_load(to + rank * half, &map, bar, at, 2, 3);
    emu::bulk_load(to + 2 * half, row + rank * 64, 64, bar);
  }
  emu::mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < 2 * half + 64; i += 32) out[rank * (2 * half + 64) + i] = shared[1024 + i];
  emu::cluster_arrive();
  emu::cluster_wait();
}

// Block 0 fills the other's shared memory, not its own.
__global__ void load_for_other(const CUtensorMap map, uint32_t bytes, uint16_t ranks, unsigned char* out) {
  unsigned char* shared = ptx::dynamic_shared();
  const uint32_t bar = ptx::shared_address(shared), rank = emu::cluster_rank();
  if (threadIdx.x == 0) {
    emu::mbarrier_init(bar, 1);
    emu::fence_mbarrier_init();
    if (rank == 1) emu::mbarrier_arrive_expect_tx(bar, bytes);
  }
  emu::cluster_arrive();
  emu::cluster_wait();
  if (rank == 0 && threadIdx.x == 0) {
    const int at[] = {0, 0};
    emu::tma_load(bar + 1024, &map, bar, at, 2, ranks);
  }
  if (rank == 1) {
    emu::mbarrier_wait(bar, 0);
    for (uint32_t i = threadIdx.x; i < bytes; i += 32) out[i] = shared[1024 + i];
  }
  emu::cluster_arrive();
  emu::cluster_wait();
}

__global__ void load_bytes(const unsigned char* in, uint32_t dst, uint32_t bytes, unsigned char* out) {
  unsigned char* shared = ptx::dynamic_shared();
  const uint32_t bar = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    emu::mbarrier_init(bar, 1);
    emu::fence_mbarrier_init();
    emu::mbarrier_arrive_expect_tx(bar, bytes);
    emu::bulk_load(bar + dst, in, bytes, bar);
  }
  __syncthreads();
  emu::mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < bytes; i += 32) out[i] = shared[dst + i];
}

void clusters(emu::Tests& tests) {
  tests.run("multicast to both blocks", [] {
    emu::Random random(7);
    constexpr int kHalf = 8 * 128;
    Tensor tensor(2, {64, 16}, random);
    const auto row = random.normal<unsigned char>(128);
    emu::Buffer<unsigned char> out(2 * (2 * kHalf + 64));
    emu::run_cluster(load_for_both, 2, 32, 1024 + 2 * kHalf + 64, 2, encode(tensor, box_of({64, 8}, 128)), row.data(),
                     uint32_t(kHalf), out.data());
    Bytes expected;
    for (int rank = 0; rank < 2; ++rank) {
      Bytes block(2 * kHalf);
      for (int i = 0; i < 2 * kHalf / 16; ++i)
        std::memcpy(&block[emu::exchanged(i, 128) * 16], tensor.data.data() + i * 16, 16);
      expected.insert(expected.end(), block.begin(), block.end());
      expected.insert(expected.end(), row.data() + rank * 64, row.data() + rank * 64 + 64);
    }
    emu::expect_equal(out, expected);
  });
  tests.run("multicast to the other block alone", [] {
    emu::Random random(8);
    Tensor tensor(2, {64, 4}, random);
    emu::Buffer<unsigned char> out(512);
    const auto go = [&](uint16_t ranks) {
      emu::run_cluster(load_for_other, 2, 32, 1024 + 512, 2, encode(tensor, box_of({64, 4})), 512u, ranks, out.data());
    };
    go(2);
    emu::expect_equal(out, Bytes(tensor.data.data(), tensor.data.data() + 512));
    emu::expect_error("block 2 of a cluster of 2", [&] { go(4); });
  });
  tests.run("bulk load", [] {
    emu::Random random(9);
    const auto in = random.normal<unsigned char>(160);
    for (const uint32_t bytes : {16, 48, 160}) {
      emu::Buffer<unsigned char> out(bytes);
      emu::run(load_bytes, 1, 32, 32 + bytes, in.data(), 32u, bytes, out.data());
      emu::expect_equal(out, Bytes(in.data(), in.data() + bytes));
    }
    emu::Buffer<unsigned char> out(176);
    const auto expect = [&](const char* error, int shift, uint32_t dst, uint32_t bytes, size_t shared = 256) {
      emu::expect_error(error, [&] { emu::run(load_bytes, 1, 32, shared, in.data() + shift, dst, bytes, out.data()); });
    };
    expect("no multiple of 16", 0, 32, 24);
    expect("no multiple of 16", 0, 32, 0);
    expect("the global address", 8, 32, 16);
    expect("the shared address", 0, 40, 16);
    expect("outside every global buffer", 16, 32, 160);
    expect("lies outside", 0, 112, 160);
  });
}

// ---- what is asked for wrongly

__global__ void prefetch(const unsigned char* map) {
  emu::prefetch_tensormap(reinterpret_cast<const CUtensorMap*>(map));
}

__global__ void read_early(const CUtensorMap map, uint32_t bytes, unsigned char* out) {
  unsigned char* shared = ptx::dynamic_shared();
  const uint32_t bar = ptx::shared_address(shared);
  const int at[] = {0, 0};
  emu::mbarrier_init(bar, 1);
  emu::fence_mbarrier_init();
  emu::mbarrier_arrive_expect_tx(bar, bytes);
  emu::tma_load(bar + 1024, &map, bar, at, 2, 0);
  for (uint32_t i = 0; i < bytes; ++i) out[i] = shared[1024 + i];
  emu::mbarrier_wait(bar, 0);
}

__global__ void load_without_barrier(const CUtensorMap map, uint32_t dst) {
  const uint32_t bar = ptx::shared_address(ptx::dynamic_shared());
  const int at[] = {0, 0};
  emu::tma_load(bar + dst, &map, bar, at, 2, 0);
}

void faults(emu::Tests& tests) {
  tests.run("loads that are asked for wrongly", [] {
    emu::Random random(14);
    Tensor tensor(2, {64, 8}, random);
    emu::Buffer<unsigned char> out(2048);
    const auto expect = [&](const char* error, const CUtensorMap& map, int rank, uint32_t dst) {
      emu::expect_error(
          error, [&] { emu::run(load_box, 1, 32, 4096, map, At({0, 0, 0, 0, 0}), rank, dst, 1024u, out.data()); });
    };
    const Image image{1, 8, 1, 64, 1, 1, 0, 1};
    Tensor pixels(2, {64, 1, 8, 1}, random);
    const CUtensorMap exchanged = encode(tensor, box_of({64, 8}, 128));
    expect("1 coordinates for a tensor map of rank 2", exchanged, 1, 1024);
    expect("of the other mode", encode(pixels, image, 64, 8, 128), 4, 1024);
    expect("no tensor map was encoded", CUtensorMap{}, 2, 1024);
    expect("the shared address", exchanged, 2, 1024 + 512);
    expect("the shared address", encode(tensor, box_of({32, 8}, 64)), 2, 1024 + 256);
    expect("the shared address", encode(tensor, box_of({16, 8}, 32)), 2, 1024 + 128);
    expect("the shared address", encode(tensor, box_of({64, 8})), 2, 1024 + 64);
    for (const uint32_t dst : {1024, 2048})
      emu::expect_error("lies outside", [&] { emu::run(load_without_barrier, 1, 1, 2047, exchanged, dst); });
    tensor.size[1] = 9;
    expect("outside every global buffer", encode(tensor, box_of({64, 9}, 128)), 2, 1024);
    tensor.size[1] = 8;
    emu::expect_error("deadlock",
                      [&] { emu::run(load_box, 1, 32, 4096, exchanged, At({0, 0}), 2, 1024u, 1040u, out.data()); });
    emu::expect_error("no mbarrier was initialised",
                      [&] { emu::run(load_without_barrier, 1, 1, 4096, exchanged, 1024u); });
    const auto fetch = [&](int shift) {
      emu::run(prefetch, 1, 1, 0, static_cast<const unsigned char*>(out.data() + shift));
    };
    emu::expect_error("prefetch.tensormap: no tensor map was encoded", [&] { fetch(0); });
    emu::expect_error("is no multiple of 64", [&] { fetch(32); });
  });
  tests.run("pixels that are asked for wrongly", [] {
    emu::Random random(15);
    const Image image{2, 5, 6, 64, 3, 2, 2, 1};
    Tensor x(2, {64, 6, 5, 2}, random);
    emu::Buffer<unsigned char> out(1024);
    const auto go = [&](const std::vector<int>& at, uint16_t offset_w, uint16_t offset_h) {
      emu::run(load_pixels, 1, 32, 2048, encode(x, image, 64, 8, 128), At(at), offset_w, offset_h, 1024u, out.data());
    };
    go({0, -1, -2, 0}, 2, 2);
    go({0, 3, 4, 1}, 255, 255);
    emu::expect_error("w is -3, outside", [&] { go({0, -3, -2, 0}, 0, 0); });
    emu::expect_error("w is 7, outside", [&] { go({0, 7, -2, 0}, 0, 0); });
    emu::expect_error("h is -4, outside", [&] { go({0, -1, -4, 0}, 0, 0); });
    emu::expect_error("h is 6, outside", [&] { go({0, -1, 6, 0}, 0, 0); });
    emu::expect_error("steps of 2 from -1 do not meet", [&] { go({0, 0, -2, 0}, 0, 0); });
    emu::expect_error("steps of 2 from -2 do not meet", [&] { go({0, -1, 1, 0}, 0, 0); });
    emu::expect_error("offsets 256, 0", [&] { go({0, -1, -2, 0}, 256, 0); });
    emu::expect_error("offsets 0, 256", [&] { go({0, -1, -2, 0}, 0, 256); });
  });
  tests.run("a box that is read before it came", [] {
    emu::Random random(17);
    Tensor tensor(2, {64, 8}, random);
    emu::Buffer<unsigned char> out(1024);
    const auto go = [&] { emu::run(read_early, 1, 1, 2048, encode(tensor, box_of({64, 8})), 1024u, out.data()); };
    if (emu::memory::kChecked) return emu::expect_error("on its way", go);
    go();
    emu::expect_equal(out, Bytes(1024, 0xff));
  });
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  tiles(tests);
  images(tests);
  clusters(tests);
  faults(tests);
  return tests.result();
}
