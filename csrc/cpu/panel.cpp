// isa: portable avx2 avx512 avx512_bf16
// The inner loop of panel.h, compiled for every number of vectors.
#include "panel.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

// Rows multiplied side by side, so that enough independent sums hide the latency of a multiply-add. The sums, the values
// and one of them spread out have to fit the registers.
constexpr int rows_together(int vectors) {
#if defined(__AVX512F__)
  return vectors >= 5 ? 2 : 4;
#else
  return vectors >= 7 ? 1 : vectors >= 4 ? 2 : 4;
#endif
}

template <int V, int kKept>
inline void multiply_kept(Vec* sum, Vec values, uint32_t bits, const float* group) {
  const Vec value = spread<kKept>(values);
  const float* column = group + (kKept / 2 * 4 + (bits >> 2 * kKept & 3)) * (V * kLanes);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sum[v] += value * load(column + v * kLanes);
}

template <int V, int R>
inline void multiply_rows(const Block<float>& w, const float* panel, float* sums, bool first) {
  constexpr int kPositions = V * kLanes;
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = first ? Vec{} : load(sums + r * kPositions + v * kLanes);

  for (int64_t byte = 0; byte < w.columns / 8; ++byte) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint32_t bits = w.meta[r * w.meta_stride + byte];
      const Vec values = broadcast_quad(w.values + r * w.value_stride + byte * 4);
      multiply_kept<V, 0>(sum[r], values, bits, panel);
      multiply_kept<V, 1>(sum[r], values, bits, panel);
      multiply_kept<V, 2>(sum[r], values, bits, panel);
      multiply_kept<V, 3>(sum[r], values, bits, panel);
    }
    panel += 8 * kPositions;
  }

  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums + r * kPositions + v * kLanes, sum[r][v]);
}

template <int V>
void multiply(const Block<float>& w, const float* panel, float* sums, bool first) {
  constexpr int R = rows_together(V), kAhead = 4 * R;
  int64_t row = 0;
  for (; row + R <= w.rows; row += R, sums += R * V * kLanes) {
    const Block<float> rows = w.from_row(row, R);
    // Rows lie a page apart in wide layers, where the processor's own prefetcher does not follow.
    const float* next = rows.values + kAhead * w.value_stride;
    for (int64_t value = 0; value < w.columns / 2; value += 16) __builtin_prefetch(next + value);
    __builtin_prefetch(rows.meta + kAhead * w.meta_stride);
    multiply_rows<V, R>(rows, panel, sums, first);
  }
  for (; row < w.rows; ++row, sums += V * kLanes) multiply_rows<V, 1>(w.from_row(row, 1), panel, sums, first);
}

void multiply(int vectors, const Block<float>& w, const float* panel, float* sums, bool first) {
  using Kernel = void (*)(const Block<float>&, const float*, float*, bool);
  static constexpr Kernel kKernels[kMaxVectors] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                                   multiply<5>, multiply<6>, multiply<7>, multiply<8>};
  kKernels[vectors - 1](w, panel, sums, first);
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
