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
// multiply-adds a cycle: V is as large as the registers allow, and the panel stays in the first-level cache. Dense needs
// 2V multiply-adds here, so the bound against a dense kernel at peak is 2V / (V + 1/4), less the sums' own traffic.
#pragma once
#include <cstdlib>
#include <new>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../ops.h"
#include "vector.h"

namespace sparseops {
namespace SPARSEOPS_ISA {

constexpr int kMaxVectors = 12;  // sums of a row; two of AVX2's sixteen registers stay free
constexpr int kMaxPositions = kMaxVectors * kLanes;
constexpr int64_t kPanelBytes = 28 * 1024;  // leaves some of a 32 KiB first-level cache to the weight and the sums
constexpr int64_t kMaxBlockColumns = 256;
constexpr int64_t kRowsPerTask = 384;  // their sums stay in the second-level cache

// Packed columns that a panel of so many vectors holds at a time: whole cache lines of float values.
inline int64_t block_columns(int vectors) {
  return min(kMaxBlockColumns, kPanelBytes / (vectors * kVectorBytes) / 32 * 32);
}

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

// sums[row][position] (+)= w x panel, for all rows of a block and this many vectors of positions. In panel.cpp.
void multiply(int vectors, const Block<float>& w, const float* panel, float* sums, bool first);

// The block itself, or its values widened into `buffer`: 16-bit floats are a type of memory only.
inline Block<float> widened(const Block<float>& w, float*) { return w; }
template <class T>
Block<float> widened(const Block<T>& w, float* buffer) {
  for (int64_t row = 0; row < w.rows; ++row)
    for (int64_t i = 0; i < w.columns / 2; i += 4)
      store_quad(buffer + row * w.columns / 2 + i, load_quad(w.values + row * w.value_stride + i));
  return {buffer, w.meta, w.rows, w.columns, w.columns / 2, w.meta_stride};
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
    constexpr int64_t kFewestVectors = 6;  // below this a panel costs too many loads for each multiply-add
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
  const Tiling tiling(positions, w.rows, threads);
  const int64_t chunk_rows = ceil_div(w.rows, tiling.chunks);
  const int64_t panel_floats = kPanelBytes / 4;
  const int64_t sum_floats = chunk_rows * kMaxPositions;
  const int64_t wide_floats = sizeof(T) < 4 ? chunk_rows * kMaxBlockColumns / 2 : 0;
  const int64_t thread_floats = round_up(panel_floats, 16) + round_up(sum_floats, 16) + round_up(wide_floats, 16);
  threads = int(min(threads, tiling.tasks()));
  Scratch scratch(threads * thread_floats);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < tiling.tasks(); ++task) {
    float* panel = scratch.data() + thread_number() * thread_floats;
    float* sums = panel + round_up(panel_floats, 16);
    float* wide = sums + round_up(sum_floats, 16);
    const Span span = tiling.span(task);
    const int64_t row = tiling.first_row(task), rows = tiling.last_row(task) - row;
    const Block<T> chunk = w.from_row(row, rows);
    for (int64_t column = 0; column < w.columns; column += block_columns(span.vectors)) {
      const int64_t columns = min(block_columns(span.vectors), w.columns - column);
      pack(panel, span, column, columns);
      multiply(span.vectors, widened(chunk.from_column(column, columns), wide), panel, sums, column == 0);
    }
    finish(sums, span, row, rows);
  }
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
