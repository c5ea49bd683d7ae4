// isa: portable avx2 avx512 avx512_bf16
// y = act(x w^T + bias) with a 2:4 weight: positions of the panel are tokens, so x is transposed into it and the sums are
// transposed on their way out. A handful of tokens goes to few_tokens.h.
#include "epilogue.h"
#include "few_tokens.h"
#include "kernels.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

// panel[column][token] of these tokens and columns; columns past in_features are zero, tokens past the last repeat it.
template <class T>
void pack_tokens(const NM24Linear& op, float* panel, const Span& span, int64_t column, int64_t columns) {
  const int64_t pitch = span.vectors * kLanes, real = max(0, min(columns, op.in_features - column));
  const T* x = static_cast<const T*>(op.x) + span.first * op.x_stride + column;
  for (int64_t token = 0; token < pitch; token += kLanes) {
    const T* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) rows[lane] = x + min(token + lane, span.positions - 1) * op.x_stride;
    // The next block comes by while this one is multiplied.
    for (int lane = 0; lane < kLanes; ++lane)
      for (int64_t ahead = columns; ahead < 2 * columns; ahead += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(rows[lane] + ahead, 0, 2);
    int64_t k = 0;
    for (; k + 4 <= real; k += 4) {
      Vec q[4];
      load_columns(rows, k, q);
      for (int i = 0; i < 4; ++i) store(panel + (k + i) * pitch + token, q[i]);
    }
    for (; k < columns; ++k)
      for (int lane = 0; lane < kLanes; ++lane)
        panel[k * pitch + token + lane] = k < real ? to_float(rows[lane][k]) : 0.0f;
  }
}

template <class T>
void linear(const NM24Linear& op) {
  const Block<T> w = block_of<T>(op.weight);
  if (op.tokens <= kFewTokens) return linear_few_tokens<T>(op, w);
  const auto pack = [&](float* panel, const Span& span, int64_t column, int64_t columns) {
    pack_tokens<T>(op, panel, span, column, columns);
  };
  const auto finish = [&](float* sums, const Span& span, int64_t row, int64_t rows) {
    const T* bias = op.bias ? static_cast<const T*>(op.bias) + row : nullptr;
    add_bias_and_activate(sums, rows, span.vectors, bias, op.activation);
    T* y = static_cast<T*>(op.y) + span.first * w.rows + row;
    store_transposed(sums, rows, span.vectors * kLanes, span.positions, y, w.rows);
  };
  multiply_tiles(w, op.tokens, op.threads, pack, finish);
}

void nm24_linear(const NM24Linear& op) {
  switch (op.dtype) {
    case DType::f32:
      return linear<float>(op);
    case DType::f16:
      return linear<Half>(op);
    case DType::bf16:
      return linear<BFloat16>(op);
  }
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
