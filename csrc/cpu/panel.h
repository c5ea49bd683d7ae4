// The 2:4 product that linear and convolution share.
//
// A panel holds the activations of `positions` outputs (tokens, or pixels of the output image) for a block of packed
// columns, one column after the other: panel[column][position]. A row of the weight is a list of kept values, each
// with the two bits that say which column of its group of four it multiplies. So for every kept value
//
//     sums[0 .. positions) += value * panel[column][0 .. positions)
//
// with the sums in registers: V vectors of multiply-adds whose second factor comes straight from the panel. The values
// are loaded four at a time, so that is V + 1/4 loads for V multiply-adds on processors that do as many loads as
// multiply-adds a cycle. The panel stays in the first-level cache: the fewer positions it has, the more columns it holds
// and the less often the sums travel. Dense needs 2V multiply-adds here, so the bound against a dense kernel at peak is
// 2V / (V + 1/4), less the sums' own traffic.
#pragma once
#include <cstdlib>
#include <new>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "ops.h"
#include "vector.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

constexpr int kMaxVectors = 8;  // sums of a row: enough to hide the latency of two multiply-adds a cycle
constexpr int kMaxPositions = kMaxVectors * kLanes;
constexpr int64_t kPanelBytes = 24 * 1024;  // leaves some of a 32 KiB first-level cache to the weight and the sums
constexpr int64_t kMaxBlockColumns = 256;
constexpr int64_t kRowsPerTask = 384;  // their sums stay in the second-level cache

// Some rows and columns of a weight; see NM24Weight.
template <class T>
struct Block {
  const T* values;
  const uint8_t* meta;
  int64_t rows, columns;              // columns: a multiple of 8
  int64_t value_stride, meta_stride;  // between rows

  Block from_row(int64_t row, int64_t count) const {
    return {values + row * value_stride, meta + row * meta_stride, count, columns, value_stride, meta_stride};
  }
  Block from_column(int64_t column, int64_t count) const {
    return {values + column / 2, meta + column / 8, rows, count, value_stride, meta_stride};
  }
};

template <class T>
Block<T> block_of(const NM24Weight& w) {
  return {static_cast<const T*>(w.values), w.meta, w.rows, w.cols, w.cols / 2, w.cols / 8};
}

// How values of type T meet the panel: from memory as they are (float), or widened into `scratch` first.
template <class T>
struct Multiply {
  // Packed columns that a panel of so many vectors holds at a time.
  static int64_t block_columns(int vectors) {
    return min(kMaxBlockColumns, kPanelBytes / (vectors * kVectorBytes) / 16 * 16);
  }
  static int64_t scratch_floats(int64_t rows) { return sizeof(T) < 4 ? rows * kMaxBlockColumns / 2 : 0; }
  // sums[row][position] (+)= w x panel
  static void run(int vectors, const Block<T>& w, float* panel, float* scratch, float* sums, bool first);
};

// In panel.cpp.
void multiply(int vectors, const Block<float>& w, const float* panel, float* sums, bool first);

template <>
inline void Multiply<float>::run(int vectors, const Block<float>& w, float* panel, float*, float* sums, bool first) {
  multiply(vectors, w, panel, sums, first);
}

template <class T>
void Multiply<T>::run(int vectors, const Block<T>& w, float* panel, float* scratch, float* sums, bool first) {
  for (int64_t row = 0; row < w.rows; ++row)
    for (int64_t i = 0; i < w.columns / 2; i += 4)
      store_quad(scratch + row * w.columns / 2 + i, load_quad(w.values + row * w.value_stride + i));
  multiply(vectors, {scratch, w.meta, w.rows, w.columns, w.columns / 2, w.meta_stride}, panel, sums, first);
}

#if defined(SPARSEOPS_BF16_DOT)
// With a bfloat16 dot product, which sums two products a lane, a group of four columns needs no choice of columns but of
// one of their six pairs: the panel becomes pairs[group][pair][position], and a row's two kept values one factor.
// In bf16_pairs.cpp.
template <>
struct Multiply<BFloat16> {
  static int64_t block_columns(int vectors) { return max(16, kPanelBytes / (6 * vectors * kVectorBytes) / 4 * 16); }
  static int64_t scratch_floats(int64_t) { return kMaxPositions * 6 * 4 + kPanelBytes / 4; }
  static void run(int vectors, const Block<BFloat16>& w, float* panel, float* scratch, float* sums, bool first);
};
#endif

// Threads that so many products of a dense weight keep busy for longer than it takes to wake them.
inline int worthwhile_threads(int threads, int64_t products) {
  constexpr int64_t kProductsPerThread = 1 << 20;  // 10 to 50 us
  return int(min(threads, max(1, products / kProductsPerThread)));
}

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Memory of one call, aligned to a cache line and given back at its end.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(floats * 4 + 64, 64))))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// Some outputs of one task: `positions` of them lie in `vectors` vectors, the rest of the last vector is padding.
struct Span {
  int64_t first, positions;
  int vectors;
};

// How the outputs of a product are shared out: panels of positions, and chunks of rows within each.
struct Tiling {
  int64_t positions, rows, vectors, panels, chunks;

  Tiling(int64_t positions, int64_t rows, int64_t threads) : positions(positions), rows(rows) {
    constexpr int64_t kFewestVectors = 4;  // below this a panel costs too many loads for each multiply-add
    vectors = ceil_div(positions, kLanes);
    panels = ceil_div(vectors, kMaxVectors);
    panels = min(round_up(panels, threads), max(panels, vectors / kFewestVectors));
    chunks = max(ceil_div(rows, kRowsPerTask), ceil_div(threads, panels));
    chunks = min(chunks, rows);
  }
  int64_t tasks() const { return panels * chunks; }
  Span span(int64_t task) const {
    const int64_t panel = task / chunks, begin = panel * vectors / panels, end = (panel + 1) * vectors / panels;
    return {begin * kLanes, min(positions, end * kLanes) - begin * kLanes, int(end - begin)};
  }
  int64_t first_row(int64_t task) const { return task % chunks * rows / chunks; }
  int64_t last_row(int64_t task) const { return (task % chunks + 1) * rows / chunks; }
};

// For every tile: pack(panel, span, first column, columns) fills a panel block by block, and
// finish(sums, span, first row, rows) takes sums[row][vectors * kLanes].
template <class T, class Pack, class Finish>
void multiply_tiles(const Block<T>& w, int64_t positions, int threads, const Pack& pack, const Finish& finish) {
  if (positions == 0 || w.rows == 0) return;
  threads = worthwhile_threads(threads, positions * w.rows * w.columns);
  const Tiling tiling(positions, w.rows, threads);
  const int64_t chunk_rows = ceil_div(w.rows, tiling.chunks);
  const int64_t panel_floats = round_up(kPanelBytes / 4, 16);
  const int64_t sum_floats = round_up(chunk_rows * kMaxPositions, 16);
  const int64_t scratch_floats = round_up(Multiply<T>::scratch_floats(chunk_rows), 16);
  const int64_t thread_floats = panel_floats + sum_floats + scratch_floats;
  threads = int(min(threads, tiling.tasks()));
  const Scratch memory(threads * thread_floats);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < tiling.tasks(); ++task) {
    float* panel = memory.data() + thread_number() * thread_floats;
    float* sums = panel + panel_floats;
    float* scratch = sums + sum_floats;
    const Span span = tiling.span(task);
    const int64_t row = tiling.first_row(task), rows = tiling.last_row(task) - row;
    const Block<T> chunk = w.from_row(row, rows);
    const int64_t step = Multiply<T>::block_columns(span.vectors);
    int64_t column = 0;
    do {  // a weight without columns still has sums: zeros
      const int64_t columns = min(step, w.columns - column);
      pack(panel, span, column, columns);
      Multiply<T>::run(span.vectors, chunk.from_column(column, columns), panel, scratch, sums, column == 0);
      column += columns;
    } while (column < w.columns);
    finish(sums, span, row, rows);
  }
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
