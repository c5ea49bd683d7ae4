// isa: portable avx2 avx512 avx512_bf16
// The 2:4 product for a handful of tokens, where time goes into reading the weight once.
//
// The four activations of a group are a table in a quad of vector lanes, from which the metadata picks: no activation is
// loaded by index. With one or two tokens the lanes are consecutive kept values of a row; with more, a transposed
// block of them is worth its shuffles, and the lanes are rows.
#include "few_tokens.h"

#include "epilogue.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

namespace {

// A vector of kept values spans this many columns: each quad of lanes holds the values of two groups.
constexpr int kSpan = 2 * kLanes;
constexpr int kRows = 4;  // of multiply_values: they share the tables
constexpr int kMaxRows = kLanes > kRows ? kLanes : kRows;

// Per span of columns, first the even group of each quad of lanes, then the odd one.
void arrange_tables(const float* x, int64_t columns, float* tables) {
  for (int64_t column = 0; column < columns; column += 8) {
    float* even = tables + column / kSpan * kSpan + column % kSpan / 2;
    std::memcpy(even, x + column, 16);
    std::memcpy(even + kLanes, x + column + 4, 16);
  }
}

// out[token][row] = the product of a row with the tables of a token.
template <int kTokens, class T>
void multiply_values(const T* const* values, const uint8_t* const* meta, int64_t columns, const float* tables,
                     float* out) {
  Words shifts;
  for (int lane = 0; lane < kLanes; ++lane) shifts[lane] = 2 * lane;
  Vec sum[kTokens][kRows] = {};
  for (int64_t column = 0; column < columns; column += 32) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < 32; part += kSpan) {
      Vec even[kTokens], odd[kTokens];
      for (int token = 0; token < kTokens; ++token) {
        even[token] = load(tables + token * columns + column + part);
        odd[token] = load(tables + token * columns + column + part + kLanes);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        uint32_t word;
        std::memcpy(&word, meta[row] + column / 8, sizeof word);
        const Indices index = reinterpret_cast<Indices>((Words{} + word) >> (shifts + uint32_t(part)));
        const Vec kept = load_wide(values[row] + (column + part) / 2);
        for (int token = 0; token < kTokens; ++token)
          sum[token][row] += kept * blend_halves(select(even[token], index), select(odd[token], index));
      }
    }
  }
  for (int token = 0; token < kTokens; ++token)
    for (int row = 0; row < kRows; ++row) out[token * kRows + row] = sum_of_lanes(sum[token][row]);
}

// One vector of metadata words: 32 columns of each of kLanes rows, the first group in the low bits.
inline Indices load_words(const uint8_t* const* meta, int64_t byte) {
  Indices words;
  for (int lane = 0; lane < kLanes; ++lane) {
    int32_t word;
    std::memcpy(&word, meta[lane] + byte, sizeof word);
    words[lane] = word;
  }
  return words;
}

// out[token][row] = the product of kLanes rows with x[token][columns].
template <int kTokens, class T>
void multiply_transposed(const T* const* values, const uint8_t* const* meta, int64_t columns, const float* x,
                         float* out) {
  constexpr int kChains = kTokens <= 4 ? 2 : 1;  // independent sums for the latency of the multiply-add
  Vec sum[kTokens][kChains] = {};
  for (int64_t column = 0; column < columns; column += 32) {
    Indices words = load_words(meta, column / 8);
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < 4; ++pair) {  // of groups
      Vec kept[4];
      load_columns(values, column / 2 + 4 * pair, kept);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
        for (int token = 0; token < kTokens; ++token) {
          const Vec table = broadcast_quad(x + token * columns + column + 8 * pair + i / 2 * 4);
          sum[token][i % kChains] += kept[i] * select(table, words);
        }
        words >>= 2;
      }
    }
  }
  for (int token = 0; token < kTokens; ++token)
    store(out + token * kLanes, kChains == 2 ? sum[token][0] + sum[token][kChains - 1] : sum[token][0]);
}

// out[token][row] for `tokens` tokens and `rows` rows at once, x prepared as the kernel wants it.
template <class T>
struct Kernel {
  void (*run)(const T* const* values, const uint8_t* const* meta, int64_t columns, const float* x, float* out);
  int tokens, rows;
  bool tables;
};

// The fewest tokens, out of those compiled, that hold so many.
template <class T>
Kernel<T> kernel_for(int64_t tokens) {
  if (tokens == 1) return {multiply_values<1, T>, 1, kRows, true};
  if (tokens == 2) return {multiply_values<2, T>, 2, kRows, true};
  if (tokens <= 4) return {multiply_transposed<4, T>, 4, kLanes, false};
  if (tokens <= 6) return {multiply_transposed<6, T>, 6, kLanes, false};
  return {multiply_transposed<8, T>, 8, kLanes, false};
}

}  // namespace

template <class T>
void linear_few_tokens(const NM24Linear& op, const Block<T>& w) {
  const Kernel<T> kernel = kernel_for<T>(op.tokens);
  const Scratch memory((kernel.tokens + 1) * w.columns);
  float* const x = memory.data();
  float* const wide = x + kernel.tokens * w.columns;
  for (int64_t token = 0; token < kernel.tokens; ++token) {
    const T* in = static_cast<const T*>(op.x) + token * op.x_stride;
    float* out = kernel.tables ? wide : x + token * w.columns;
    const int64_t real = token < op.tokens ? op.in_features : 0;
    for (int64_t column = 0; column < real; ++column) out[column] = to_float(in[column]);
    for (int64_t column = real; column < w.columns; ++column) out[column] = 0.0f;
    if (kernel.tables) arrange_tables(wide, w.columns, x + token * w.columns);
  }
  const int64_t blocks = ceil_div(w.rows, kernel.rows);
  const int threads = worthwhile_threads(int(min(op.threads, blocks)), op.tokens * w.rows * w.columns);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kernel.rows, rows = min(kernel.rows, w.rows - first);
    const T* values[kMaxRows];
    const uint8_t* meta[kMaxRows];
    for (int i = 0; i < kernel.rows; ++i) {
      const int64_t row = first + min(i, rows - 1);
      values[i] = w.values + row * w.value_stride;
      meta[i] = w.meta + row * w.meta_stride;
    }
    float sums[kFewTokens * kMaxRows];
    kernel.run(values, meta, w.columns, x, sums);
    for (int64_t token = 0; token < op.tokens; ++token) {
      float* sum = sums + token * kernel.rows;
      T* y = static_cast<T*>(op.y) + token * w.rows + first;
      for (int64_t i = 0; i < rows; ++i) sum[i] += op.bias ? to_float(static_cast<const T*>(op.bias)[first + i]) : 0.0f;
      float out[kMaxRows] = {};
      std::memcpy(out, sum, size_t(rows) * 4);
      store(out, activate(load(out), op.activation));
      copy_row(out, rows, y);
    }
  }
}

template void linear_few_tokens(const NM24Linear&, const Block<float>&);
template void linear_few_tokens(const NM24Linear&, const Block<Half>&);
template void linear_few_tokens(const NM24Linear&, const Block<BFloat16>&);

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
