// kernels: nm24_grad_values
// The gradient of kept values against sums in float64; both tiles, and the host code that chooses.
#include "cuda/nm24_grad_values.cuh"

#include "ops.h"
#include "test_support.h"

using namespace sparseops;

namespace {

struct Shape {
  int64_t rows, in_features, tokens;
  int64_t gap = 8;  // elements, NaNs, from the end of a readable row of grad or x to the next
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows that may be read up to a multiple of 16 bytes; NaNs where there is no element.
template <class T>
struct Matrix {
  int64_t width, stride;
  emu::Buffer<T> elements;

  Matrix(int64_t tokens, int64_t width, int64_t gap, emu::Random& random)
      : width(width),
        stride(round_up(width, 8) + gap),
        elements(tokens ? (tokens - 1) * stride + round_up(width, 8) : 0) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < width; ++i) elements[t * stride + i] = random.number<T>();
  }
  double at(int64_t token, int64_t i) const { return emu::to_double(elements[token * stride + i]); }
};

template <class T>
struct Problem {
  Shape shape;
  int64_t cols;
  emu::Random random;
  Matrix<T> grad, x;
  emu::Buffer<uint8_t> meta;
  emu::Buffer<T> grad_values;

  explicit Problem(const Shape& shape)
      : shape(shape),
        cols(round_up(shape.in_features, 32)),
        random(shape.rows + shape.in_features + shape.tokens),
        grad(shape.tokens, shape.rows, shape.gap, random),
        x(shape.tokens, shape.in_features, shape.gap, random),
        meta(emu::random_meta(shape.rows * cols / 4, random)),
        grad_values(shape.rows * cols / 2) {}

  CudaNM24GradValues op() {
    return {grad.elements.data(),
            grad.stride,
            x.elements.data(),
            x.stride,
            meta.data(),
            grad_values.data(),
            shape.tokens,
            shape.rows,
            shape.in_features,
            cols,
            std::is_same_v<T, __half> ? DType::f16 : DType::bf16};
  }

  template <class Tile>
  void run() {
    const dim3 grid(static_cast<unsigned>(round_up(shape.rows, Tile::kFeatures) / Tile::kFeatures),
                    static_cast<unsigned>(round_up(cols, Tile::kColumns) / Tile::kColumns));
    emu::run(nm24_grad_values_kernel<Tile>, grid, dim3(Tile::kThreads), Tile::kSharedBytes, op());
  }

  void check() const {
    std::vector<double> expected, size;
    for (int64_t i = 0; i < int64_t(grad_values.size()); ++i) {
      const int64_t m = i / (cols / 2), group = i / 2 % (cols / 4);
      const unsigned nibble = meta[i / 4] >> i / 2 % 2 * 4 & 15;
      const int64_t column = group * 4 + (i % 2 ? nibble >> 2 : nibble & 3);
      double sum = 0, without_signs = 0;
      for (int64_t t = 0; t < shape.tokens && column < shape.in_features; ++t) {
        const double term = grad.at(t, m) * x.at(t, column);
        sum += term;
        without_signs += std::abs(term);
      }
      expected.push_back(sum);
      size.push_back(without_signs);
    }
    emu::expect_close(grad_values, expected, size);
  }
};

template <class Tile>
void sums(const Shape& shape) {
  Problem<typename Tile::element_t> problem(shape);
  problem.template run<Tile>();
  problem.check();
}

// Columns past in_features stay zero even where 0 times an infinite gradient would not.
template <class Tile>
void infinite_gradient(const Shape& shape) {
  using T = typename Tile::element_t;
  Problem<T> problem(shape);
  for (int64_t m = 0; m < shape.rows; m += 3) problem.grad.elements[m] = T(INFINITY);
  problem.template run<Tile>();
  problem.check();
}

template <class Tile>
void traffic(const Shape& shape) {
  sums<Tile>(shape);
  emu::expect_ideal_traffic({});
}

template <class Tile>
void odd_traffic(const Shape& shape) {
  sums<Tile>(shape);
  emu::expect_ideal_traffic({
      {"cp_async", "rows of grad and x begin within a sector"},
      {"store_kept", "a row of meta is 24 bytes: part of one may lie in two sectors"},
  });
}

template <class T>
void host(const Shape& shape) {
  Problem<T> problem(shape);
  emu::require(cuda_nm24_grad_values(problem.op(), 0, nullptr));
  problem.check();
}

void refusals() {
  Problem<__half> problem({8, 32, 4});
  const CudaNM24GradValues good = problem.op();
  std::vector<CudaNM24GradValues> bad(9, good);
  bad[0].dtype = DType::f32;
  bad[1].rows = -1;
  bad[2].cols = 40;
  bad[3].in_features = 33;
  bad[4].grad_stride = 12;
  bad[5].x_stride = 36;
  bad[6].grad = problem.grad.elements.data() + 1;
  bad[7].x = problem.x.elements.data() + 4;
  bad[8].grad_values = problem.grad_values.data() + 1;
  for (const CudaNM24GradValues& op : bad) {
    const char* const text = cuda_nm24_grad_values(op, 0, nullptr);
    if (!text || std::strncmp(text, "nm24_grad_values: ", 18) != 0) throw emu::Error("a call was not refused");
  }
  CudaNM24GradValues empty = good;
  empty.rows = 0;
  emu::require(cuda_nm24_grad_values(empty, 0, nullptr));
}

std::string text(const Shape& s) {
  return " rows=" + std::to_string(s.rows) + " in_features=" + std::to_string(s.in_features) +
         " tokens=" + std::to_string(s.tokens);
}

template <class Tile>
void cases(emu::Tests& tests, const std::string& tile) {
  auto named = [&](const char* what, const Shape& shape, void (*body)(const Shape&)) {
    tests.run(tile + " " + what + text(shape), [&] { body(shape); });
  };
  constexpr int64_t kFeatures = Tile::kFeatures, kColumns = Tile::kColumns;
  // Copies are of 8, instructions of 16 features; half a tile is a warp's.
  for (int64_t rows : {int64_t(1), int64_t(7), int64_t(8), int64_t(9), int64_t(15), int64_t(17), kFeatures / 2 - 1,
                       kFeatures / 2 + 1, kFeatures - 1, kFeatures, kFeatures + 1, 2 * kFeatures + 3})
    named("sums", {rows, 40, 20}, sums<Tile>);
  // Copies are of 8, groups of 4, padding to 32.
  for (int64_t in_features :
       {int64_t(1), int64_t(2), int64_t(3), int64_t(4), int64_t(5), int64_t(7), int64_t(8), int64_t(9), int64_t(31),
        int64_t(32), int64_t(33), kColumns / 2 + 1, kColumns - 1, kColumns, kColumns + 1, 2 * kColumns + 33})
    named("sums", {20, in_features, 20}, sums<Tile>);
  // A step is 32 tokens, an instruction 16, a copied row of the tile 8 or 16; three steps fill the pipeline.
  for (int64_t tokens : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 129, 161, 300})
    named("sums", {24, 48, tokens}, sums<Tile>);
  named("infinite gradient", {20, 37, 20}, infinite_gradient<Tile>);
  named("traffic", {2 * kFeatures, 2 * kColumns, 64, 16}, traffic<Tile>);
  named("odd traffic", {kFeatures + 5, kColumns + 33, 35}, odd_traffic<Tile>);
}

}  // namespace

int main(int argc, char** argv) {
  emu::Tests tests(argc, argv);
  cases<LargeGradTile<__half>>(tests, "large f16");
  cases<LargeGradTile<__nv_bfloat16>>(tests, "large bf16");
  cases<SmallGradTile<__half>>(tests, "small f16");
  cases<SmallGradTile<__nv_bfloat16>>(tests, "small bf16");
  // 108 multiprocessors: 12 x 9 large tiles are enough for them, one less is not.
  for (const Shape& shape : {Shape{12 * 128, 9 * 128, 8}, Shape{11 * 128, 9 * 128, 8}, Shape{100, 100, 40}}) {
    tests.run("host f16" + text(shape), [&] { host<__half>(shape); });
    tests.run("host bf16" + text(shape), [&] { host<__nv_bfloat16>(shape); });
  }
  tests.run("refusals", refusals);
  return tests.result();
}
