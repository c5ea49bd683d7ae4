// isa: portable avx2 avx512 avx512_bf16
// The 2:4 product for a handful of tokens, where time goes into reading the weight once.
//
// The vector lanes are output rows. For each group of four columns the four activations of a token are a table that every
// quad of lanes gets a copy of, and the metadata picks from it: one permute and one multiply-add for each vector of kept
// values and token. The values stand row by row in memory, so 4x4 blocks of them are transposed on the way.
#include "few_tokens.h"

#include "epilogue.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

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

// sum[token] = the product of kLanes rows with x[token][columns], which is padded to whole words of metadata.
template <int kTokens, class T>
void multiply_few(const T* const* values, const uint8_t* const* meta, int64_t columns, const float* x, Vec* out) {
  constexpr int kChains = kTokens == 1 ? 4 : kTokens <= 4 ? 2 : 1;  // independent sums for the latency of the multiply-add
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
  for (int token = 0; token < kTokens; ++token) {
    out[token] = sum[token][0];
    for (int chain = 1; chain < kChains; ++chain) out[token] += sum[token][chain];
  }
}

// The fewest tokens, out of those compiled, that hold so many.
template <class T>
auto kernel_for(int64_t tokens) {
  return tokens <= 1   ? multiply_few<1, T>
         : tokens <= 2 ? multiply_few<2, T>
         : tokens <= 4 ? multiply_few<4, T>
         : tokens <= 6 ? multiply_few<6, T>
                       : multiply_few<8, T>;
}

template <class T>
void linear_few_tokens(const NM24Linear& op, const Block<T>& w) {
  const auto kernel = kernel_for<T>(op.tokens);
  const Scratch x(kFewTokens * w.columns);
  for (int64_t token = 0; token < kFewTokens; ++token) {
    const T* in = static_cast<const T*>(op.x) + token * op.x_stride;
    float* out = x.data() + token * w.columns;
    for (int64_t column = 0; column < w.columns; ++column)
      out[column] = token < op.tokens && column < op.in_features ? to_float(in[column]) : 0.0f;
  }
  const int64_t blocks = ceil_div(w.rows, kLanes);
#pragma omp parallel for num_threads(int(min(op.threads, blocks))) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const T* values[kLanes];
    const uint8_t* meta[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = min(block * kLanes + lane, w.rows - 1);
      values[lane] = w.values + row * w.value_stride;
      meta[lane] = w.meta + row * w.meta_stride;
    }
    Vec sum[kFewTokens];
    kernel(values, meta, w.columns, x.data(), sum);
    const int64_t row = block * kLanes, rows = min(kLanes, w.rows - row);
    float bias[kLanes] = {};
    if (op.bias)
      for (int64_t i = 0; i < rows; ++i) bias[i] = to_float(static_cast<const T*>(op.bias)[row + i]);
    for (int64_t token = 0; token < op.tokens; ++token) {
      float out[kLanes];
      store(out, activate(sum[token] + load(bias), op.activation));
      copy_row(out, rows, static_cast<T*>(op.y) + token * w.rows + row);
    }
  }
}

template void linear_few_tokens(const NM24Linear&, const Block<float>&);
template void linear_few_tokens(const NM24Linear&, const Block<Half>&);
template void linear_few_tokens(const NM24Linear&, const Block<BFloat16>&);

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
