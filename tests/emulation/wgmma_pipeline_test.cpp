// Copies, mbarriers and wgmma together: a thread that fills a ring of stages, a warpgroup that multiplies from it. Right
// use must go through, and each way to use the ring wrongly must be seen.
#include "cuda/wgmma_sp.cuh"
#include "reference_tensors.h"

using namespace sparseops;

namespace {

constexpr int kTokens = 16, kStages = 3;
// A stage is 64 columns, two steps: rows of A's kept values of 64 bytes, of B's of 128; a word of metadata for each step
// and thread.
constexpr uint32_t kBytesA = 64 * 64, kBytesB = kTokens * 128, kBytesMetadata = 2 * 128 * 4;
constexpr uint32_t kStageBytes = 8192, kB = kBytesA, kMetadata = kB + kBytesB;
static_assert(kMetadata + kBytesMetadata <= kStageBytes && kB % 1024 == 0);

enum class Fault {
  none,
  releases_early,
  releases_never,
  fills_at_once,
  reads_at_once,
  expects_less,
  waits_for_other_phase,
  begins_before_initialisation,
};

// descriptor_128b for rows of 64 bytes.
uint64_t descriptor_64b(uint32_t address) {
  return uint64_t{2} << 62 | uint64_t{512 >> 4} << 32 | 1 << 16 | (address & 0x3ffff) >> 4;
}

__global__ void pipeline(const CUtensorMap a, const CUtensorMap b, const unsigned char* metadata, int steps, float* d,
                         Fault fault) {
  const uint32_t base = ptx::shared_address(ptx::dynamic_shared()), full = base + kStages * kStageBytes,
                 empty = full + kStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, 1);
    }
    ptx::fence_mbarrier_init();
  }
  if (fault != Fault::begins_before_initialisation) __syncthreads();
  if (threadIdx.x < 128) {
    for (int i = 0; threadIdx.x == 0 && i < steps; ++i) {
      const uint32_t slot = i % kStages, parity = i / kStages % 2, to = base + slot * kStageBytes,
                     bar = full + slot * 8;
      if (fault != Fault::fills_at_once) ptx::mbarrier_wait(empty + slot * 8, parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(bar, kBytesA + kBytesB + kBytesMetadata - (fault == Fault::expects_less ? 16 : 0));
      ptx::tma_load<2>(to, &a, bar, {i * 32, 0}, ptx::L2Policy::normal);
      ptx::tma_load<2>(to + kB, &b, bar, {i * 64, 0}, ptx::L2Policy::normal);
      ptx::bulk_load(to + kMetadata, metadata + i * kBytesMetadata, kBytesMetadata, bar);
    }
    return;
  }
  const uint32_t t = threadIdx.x - 128;
  float sums[kTokens / 2];
  uint32_t words[2][2];  // those of the last step are in use while the next ones are read
  for (int i = 0; i < steps; ++i) {
    const uint32_t slot = i % kStages, parity = i / kStages % 2 ^ (fault == Fault::waits_for_other_phase);
    if (fault != Fault::reads_at_once) ptx::mbarrier_wait(full + slot * 8, parity);
    const uint32_t from = base + slot * kStageBytes;
    const auto in = reinterpret_cast<const uint32_t*>(ptx::dynamic_shared() + slot * kStageBytes + kMetadata);
    uint32_t (&now)[2] = words[i % 2];
    for (int step = 0; step < 2; ++step) now[step] = in[step * 128 + t];
    ptx::wgmma_fence();
    for (int step = 0; step < 2; ++step)
      ptx::wgmma_sp<__half, kTokens>(sums, descriptor_64b(from) + (step * 32 >> 4),
                                     ptx::descriptor_128b(from + kB) + (step * 64 >> 4), now[step], i > 0 || step > 0);
    ptx::wgmma_commit();
    if (fault == Fault::releases_early && t == 0) ptx::mbarrier_arrive(empty + slot * 8);
    ptx::wgmma_wait<1>();
    const uint32_t last = (i + kStages - 1) % kStages;
    if (i > 0 && t == 0 && fault != Fault::releases_early && fault != Fault::releases_never)
      ptx::mbarrier_arrive(empty + last * 8);
  }
  ptx::wgmma_wait<0>();
  ptx::keep_in_registers(sums);
  for (int i = 0; i < kTokens / 2; ++i) d[t * (kTokens / 2) + i] = sums[i];
}

void go(int steps, Fault fault = Fault::none) {
  emu::Random random(steps);
  const int columns = steps * 64;
  const emu::Sparse pattern = emu::random_pattern(64, columns, random);
  const auto kept = emu::random_matrix<__half>(64, columns / 2, random);
  const auto x = emu::random_matrix<__half>(kTokens, columns, random);
  emu::Tensor a(2, {columns / 2, 64}, random), b(2, {columns, kTokens}, random);
  for (int i = 0; i < 64; ++i) std::memcpy(a[{0, i}], kept[i].data(), columns);
  for (int i = 0; i < kTokens; ++i) std::memcpy(b[{0, i}], x[i].data(), columns * 2);
  emu::Buffer<uint32_t> metadata(steps * 256);
  for (int step = 0; step < 2 * steps; ++step) {
    emu::Sparse part{32, {}};
    for (const auto& row : pattern.nibble) part.nibble.emplace_back(row.begin() + step * 8, row.begin() + step * 8 + 8);
    const auto words = emu::metadata16(part, 0, 0);
    std::copy(words.data(), words.data() + 128, metadata.data() + step * 128);
  }
  emu::Buffer<float> d(64 * kTokens);
  emu::run(pipeline, 1, 256, kStages * (kStageBytes + 16), emu::encode(a, emu::box_of({32, 64}, 64)),
           emu::encode(b, emu::box_of({64, kTokens}, 128)), reinterpret_cast<const unsigned char*>(metadata.data()),
           steps, d.data(), fault);

  auto transposed = emu::matrix<__half>(columns, kTokens);
  for (int k = 0; k < columns; ++k)
    for (int j = 0; j < kTokens; ++j) transposed[k][j] = x[j][k];
  const auto sum = emu::product<double>(pattern, kept, transposed);
  std::vector<double> got, expected;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < kTokens / 2; ++i) {
      const emu::Place place = emu::d32(t % 32, i % 4);
      got.push_back(d[t * (kTokens / 2) + i]);
      expected.push_back(sum[t / 32 * 16 + place.row][i / 4 * 8 + place.column]);
    }
  emu::expect_within(got, expected, std::vector<double>(got.size(), columns), 0);
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  for (const int steps : {1, 2, 3, 4, 7, 20}) tests.run("%d steps", steps, [=] { go(steps); });
  const bool races = emu::memory::kChecked;
  const auto expect = [&](const char* name, Fault fault, const char* error) {
    tests.run("%s", name, [=] { emu::expect_error(error, [&] { go(8, fault); }); });
  };
  if (races) expect("a stage given back before it was multiplied", Fault::releases_early, "data race");
  expect("no stage given back", Fault::releases_never, "deadlock");
  expect("a stage filled before it was given back", Fault::fills_at_once, "more arrivals at the mbarrier");
  expect("a stage read before it was filled", Fault::reads_at_once, races ? "data race" : "which is not two rising");
  expect("less expected than comes", Fault::expects_less, "deadlock");
  expect("a wait for the other phase", Fault::waits_for_other_phase, races ? "data race" : "which is not two rising");
  if (races) expect("mbarriers used before all know of them", Fault::begins_before_initialisation, "mbarrier.init");
  return tests.result();
}
