// The kernel for few tokens, launched as nm24_linear.cu does, against sums in float64.
#include "cuda/nm24_few_tokens.cuh"

#include "ops.h"
#include "test_support.h"

using namespace sparseops;

namespace {

struct Shape {
  int rows, tokens, in_features, splits;
  int gap = 8;  // elements, NaNs, from the end of a row of x to the next
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// y, and what its sums come to without signs.
struct Expected {
  std::vector<double> y, size;
};

template <class T>
struct Problem {
  Shape shape;
  int64_t x_stride;
  emu::Random random;
  emu::Weight<T> weight;
  emu::Buffer<T> x;

  explicit Problem(const Shape& shape)
      : shape(shape),
        x_stride(shape.in_features + shape.gap),
        random(shape.rows + shape.tokens + shape.in_features),
        weight(shape.rows, round_up(shape.in_features, 32), random),
        x((shape.tokens - 1) * x_stride + shape.in_features) {
    for (int t = 0; t < shape.tokens; ++t)
      for (int k = 0; k < shape.in_features; ++k) x[t * x_stride + k] = random.number<T>();
  }

  // Sums alone; `add` and `activate` come after.
  template <class Add>
  Expected expected(Add add) const {
    Expected result;
    for (int t = 0; t < shape.tokens; ++t) {
      for (int m = 0; m < shape.rows; ++m) {
        double sum = 0, size = 0;
        for (int k = 0; k < shape.in_features; ++k) {
          const double term = weight.dense[m * weight.cols + k] * emu::to_double(x[t * x_stride + k]);
          sum += term;
          size += std::abs(term);
        }
        result.y.push_back(add(sum, t, m));
        result.size.push_back(size);
      }
    }
    return result;
  }

  template <int kTokens>
  void run(const CudaWeight& slabs, const CudaEpilogue& epilogue, void* y) {
    using Tile = NM24FewTokens<T, kTokens>;
    const unsigned tiles = static_cast<unsigned>(round_up(shape.rows, Tile::kFeatures) / Tile::kFeatures *
                                                 (round_up(shape.tokens, kTokens) / kTokens));
    const bool splits = shape.splits > 1;
    emu::Buffer<float> partials(splits ? size_t(tiles) * shape.splits * Tile::kFeatures * kTokens : 0);
    emu::Buffer<uint32_t> counters(splits ? tiles : 0);
    counters.fill(0);
    CudaPlan plan{};
    plan.splits = shape.splits;
    if (splits) plan.partials = partials.data(), plan.counters = counters.data();
    const CudaNM24Linear op{x.data(), x_stride, slabs, epilogue, y, shape.tokens, shape.in_features, DType::f16};
    for (int again = 0; again < 2; ++again)  // the second launch finds the counters as the first one left them
      emu::run(nm24_few_tokens_kernel<T, kTokens>, dim3(tiles, 1, shape.splits), dim3(Tile::kThreads),
               Tile::kSharedBytes, op, plan);
    emu::expect_equal(counters, std::vector<uint32_t>(counters.size(), 0));
    if (splits) emu::expect_all_splits_busy(partials, tiles, shape.splits, round_up(slabs.cols, 128) / 128);
  }

  CudaWeight canonical() {
    return {weight.values.data(), weight.slabs.data(), weight.rows, weight.cols, weight.slab_rows, nullptr};
  }
};

template <class T>
constexpr DType kDType = std::is_same_v<T, __half> ? DType::f16 : DType::bf16;

CudaEpilogue only_round(DType dtype) { return {nullptr, nullptr, nullptr, nullptr, dtype, Activation::none}; }

template <class T, int kTokens>
void sums(const Shape& shape) {
  Problem<T> problem(shape);
  emu::Buffer<T> y(size_t(shape.tokens) * shape.rows);
  problem.template run<kTokens>(problem.canonical(), only_round(kDType<T>), y.data());
  const Expected expected = problem.expected([](double sum, int, int) { return sum; });
  emu::expect_close(y, expected.y, expected.size);
}

// A bias, a residual, an activation, and y in f32: that the epilogue is told where the tile lies.
template <class T, int kTokens>
void epilogue(const Shape& shape) {
  Problem<T> problem(shape);
  const auto bias = problem.random.template normal<float>(shape.rows);
  const auto residual = problem.random.template normal<float>(size_t(shape.tokens) * shape.rows);
  emu::Buffer<float> y(size_t(shape.tokens) * shape.rows);
  problem.template run<kTokens>(
      problem.canonical(), {bias.data(), residual.data(), nullptr, nullptr, DType::f32, Activation::relu}, y.data());
  const Expected expected = problem.expected([&](double sum, int t, int m) {
    return std::max(0.0, sum + double(bias[m]) + double(residual[t * shape.rows + m]));
  });
  emu::expect_close(y, expected.y, expected.size);
}

// An infinity must reach its own row alone: columns past the last one are zeros, not what happens to be loaded.
template <class T, int kTokens>
void infinite_weight(const Shape& shape) {
  Problem<T> problem(shape);
  const int64_t column = problem.weight.meta[0] & 3;
  problem.weight.values[0] = T(INFINITY);
  problem.weight.dense[column] = INFINITY;
  emu::Buffer<T> y(size_t(shape.tokens) * shape.rows);
  problem.template run<kTokens>(problem.canonical(), only_round(kDType<T>), y.data());
  const Expected expected = problem.expected([](double sum, int, int) { return sum; });
  emu::expect_close(y, expected.y, expected.size);
}

// Slabs that end with the last 16-row tile, which is the first of its pair.
template <class T, int kTokens>
void tight_slabs(const Shape& shape) {
  Problem<T> problem(shape);
  const emu::Weight<T>& weight = problem.weight;
  const int64_t slabs = round_up(weight.cols, 128) / 128, rows = round_up(shape.rows, 16);
  emu::Buffer<uint8_t> tight(slabs * rows * 16);
  for (int64_t slab = 0; slab < slabs; ++slab)
    std::memcpy(tight.data() + slab * rows * 16, weight.slabs.data() + slab * weight.slab_rows * 16, rows * 16);
  emu::Buffer<T> y(size_t(shape.tokens) * shape.rows);
  problem.template run<kTokens>({weight.values.data(), tight.data(), weight.rows, weight.cols, rows},
                                only_round(kDType<T>), y.data());
  const Expected expected = problem.expected([](double sum, int, int) { return sum; });
  emu::expect_close(y, expected.y, expected.size);
}

// Splits are added up in the order of their numbers: blocks in another order give the same bits.
template <class T, int kTokens>
void same_bits(const Shape& shape) {
  const char* const given = std::getenv("EMU_SEED");
  const std::string restore = given ? given : "";
  std::vector<std::vector<float>> results;
  for (const char* seed : {"0", "1", "2", "3"}) {
    setenv("EMU_SEED", seed, 1);
    Problem<T> problem(shape);
    emu::Buffer<float> y(size_t(shape.tokens) * shape.rows);
    problem.template run<kTokens>(problem.canonical(), only_round(DType::f32), y.data());
    results.emplace_back(y.data(), y.data() + y.size());
    if (results.back() != results.front()) throw emu::Error(std::string("the result differs at seed ") + seed);
  }
  given ? setenv("EMU_SEED", restore.c_str(), 1) : unsetenv("EMU_SEED");
}

template <class T, int kTokens>
void traffic(const Shape& shape) {
  sums<T, kTokens>(shape);
  emu::expect_ideal_traffic({});
}

template <class T, int kTokens>
void odd_traffic(const Shape& shape) {
  sums<T, kTokens>(shape);
  emu::expect_ideal_traffic({
      {"copy_x", "every other row of x begins within a sector"},
      {"store_four", "rows of y begin within a sector, and at odd numbers of elements"},
      {"store_tile_as", "of the last tile six features are stored: two of every eight threads read"},
  });
}

template <class T, int kTokens>
void cases(emu::Tests& tests, const char* type) {
  const std::string tile = std::string("few") + std::to_string(kTokens) + " " + type + " ";
  auto named = [&](const char* what, const Shape& s, void (*body)(const Shape&)) {
    tests.run(tile + what + " rows=" + std::to_string(s.rows) + " tokens=" + std::to_string(s.tokens) +
                  " in_features=" + std::to_string(s.in_features) + " splits=" + std::to_string(s.splits),
              [&] { body(s); });
  };
  // A tile is 32 rows, of two times 16, of two times 8; y is stored by fours.
  for (int rows : {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 65})
    named("sums", {rows, kTokens, 136, 1}, sums<T, kTokens>);
  for (int tokens : {1, 2, 7, 8, 9, 15, 16, 17, 33}) named("sums", {40, tokens, 136, 1}, sums<T, kTokens>);
  // Copies of 8, padding to 32, slabs of 128, 8 warps of one slab each, and of two.
  for (int in_features : {8, 16, 24, 32, 40, 56, 64, 72, 120, 128, 248, 256, 264, 1016, 1024, 1032, 2048, 2056, 3080})
    named("sums", {33, 3, in_features, 1}, sums<T, kTokens>);
  named("sums", {5, 1, 31 * 128 + 8, 1}, sums<T, kTokens>);  // so many slabs that one column more to a slab is one less
  for (int splits : {2, 3, 4, 5, 8, 9, 10}) named("sums", {40, kTokens + 1, 1100 / 8 * 8, splits}, sums<T, kTokens>);
  named("epilogue", {70, kTokens + 2, 264, 1}, epilogue<T, kTokens>);
  named("epilogue", {70, kTokens + 2, 264, 2}, epilogue<T, kTokens>);
  named("infinite weight", {20, 3, 264, 1}, infinite_weight<T, kTokens>);
  named("same bits", {40, kTokens, 1100 / 8 * 8, 5}, same_bits<T, kTokens>);
  for (int rows : {16, 33, 48}) named("tight slabs", {rows, 2, 264, 1}, tight_slabs<T, kTokens>);
  for (int splits : {1, 3}) named("traffic", {96, 2 * kTokens, 2048, splits, 16}, traffic<T, kTokens>);
  named("odd traffic", {70, 5, 520, 1, 16}, odd_traffic<T, kTokens>);
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  cases<__half, 8>(tests, "f16");
  cases<__half, 16>(tests, "f16");
  cases<__nv_bfloat16, 8>(tests, "bf16");
  cases<__nv_bfloat16, 16>(tests, "bf16");
  return tests.result();
}
