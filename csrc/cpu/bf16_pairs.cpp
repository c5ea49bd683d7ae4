// isa: avx512_bf16
// The inner loop of panel.h for bfloat16 on processors with a dot product of pairs (vdpbf16ps).
#include "panel.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

namespace {

constexpr int kPairs = 6;  // of four columns: (0,1) (0,2) (1,2) (0,3) (1,3) (2,3), in the order of their nibbles
constexpr int kPairColumns[kPairs][2] = {{0, 1}, {0, 2}, {1, 2}, {0, 3}, {1, 3}, {2, 3}};
// Which of them a nibble of metadata names. Six of the sixteen are legal; the others must only stay within the panel.
constexpr uint8_t kPairOfNibble[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 3, 4, 5, 0};

// pairs[group][pair][position] from panel[column][position]; the floats came from bfloat16, so their low halves are zero.
void pair_up(int vectors, int64_t columns, const float* panel, float* pairs) {
  const int64_t pitch = vectors * kLanes;
  for (int64_t group = 0; group < columns / 4; ++group, panel += 4 * pitch)
    for (int pair = 0; pair < kPairs; ++pair, pairs += pitch)
      for (int64_t position = 0; position < pitch; position += kLanes) {
        const Words low = reinterpret_cast<Words>(load(panel + kPairColumns[pair][0] * pitch + position));
        const Words high = reinterpret_cast<Words>(load(panel + kPairColumns[pair][1] * pitch + position));
        store(pairs + position, reinterpret_cast<Vec>(low >> 16 | high));
      }
}

template <int V, int kGroup>
inline void multiply_group(Vec* sum, Vec values, uint32_t nibbles, const float* pairs) {
  const Vec value = spread<kGroup>(values);
  const float* pair = pairs + (kGroup * kPairs + kPairOfNibble[nibbles >> 4 * kGroup & 15]) * (V * kLanes);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sum[v] = dot_pairs(sum[v], load(pair + v * kLanes), value);
}

template <int V, int R>
inline void multiply_rows(const Block<BFloat16>& w, const float* pairs, float* sums, bool first) {
  constexpr int kPositions = V * kLanes;
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = first ? Vec{} : load(sums + r * kPositions + v * kLanes);

  for (int64_t column = 0; column < w.columns; column += 16, pairs += 4 * kPairs * kPositions) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      uint16_t nibbles;
      std::memcpy(&nibbles, w.meta + r * w.meta_stride + column / 8, sizeof nibbles);
      const Vec values = broadcast_quad(reinterpret_cast<const float*>(w.values + r * w.value_stride + column / 2));
      multiply_group<V, 0>(sum[r], values, nibbles, pairs);
      multiply_group<V, 1>(sum[r], values, nibbles, pairs);
      multiply_group<V, 2>(sum[r], values, nibbles, pairs);
      multiply_group<V, 3>(sum[r], values, nibbles, pairs);
    }
  }

  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums + r * kPositions + v * kLanes, sum[r][v]);
}

template <int V>
void multiply(const Block<BFloat16>& w, const float* pairs, float* sums, bool first) {
  constexpr int R = V >= 5 ? 2 : 4, kAhead = 4 * R;
  int64_t row = 0;
  for (; row + R <= w.rows; row += R, sums += R * V * kLanes) {
    const Block<BFloat16> rows = w.from_row(row, R);
    __builtin_prefetch(rows.values + kAhead * w.value_stride);
    __builtin_prefetch(rows.meta + kAhead * w.meta_stride);
    multiply_rows<V, R>(rows, pairs, sums, first);
  }
  for (; row < w.rows; ++row, sums += V * kLanes) multiply_rows<V, 1>(w.from_row(row, 1), pairs, sums, first);
}

}  // namespace

void Multiply<BFloat16>::run(int vectors, const Block<BFloat16>& w, float* panel, float* pairs, float* sums,
                             bool first) {
  using Kernel = void (*)(const Block<BFloat16>&, const float*, float*, bool);
  static constexpr Kernel kKernels[kMaxVectors] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                                   multiply<5>, multiply<6>, multiply<7>, multiply<8>};
  pair_up(vectors, w.columns, panel, pairs);
  kKernels[vectors - 1](w, pairs, sums, first);
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
