// nm24_linear (nm24_linear.cuh has the formula) by wgmma.sp: f16, bf16, i8, any number of tokens.
//
//   x [tokens, in_features], w [rows, cols] as values and slabs, or as fragments and slabs, y [tokens, rows]
//
// Operations: tokens * rows * cols multiply-adds, of which half are done. Bytes, for 16-bit elements and tiles that do
// not overlap in the cache: rows * cols * 1.125 for each column of tiles, tokens * cols * 2 for each row of them, half
// of that in clusters. mainloop_sm90.cuh says what bounds it.
// State: it has not yet run on a GPU; tests/emulation runs it on the CPU.
#pragma once
#include "cuda/epilogue_sm90.cuh"

namespace sparseops {

// Rows of x, atom after atom.
struct Sm90Rows {
  CUtensorMap map;
  int atom_columns;

  struct Cursor {
    int column, token;
  };
  SPARSEOPS_DEVICE Cursor start(int atom, int token) const { return {atom * atom_columns, token}; }

  SPARSEOPS_DEVICE void load(Cursor& cursor, uint32_t to, uint32_t bar, int cluster) const {
    const int at[] = {cursor.column, cursor.token};
    cursor.column += atom_columns;
    if (cluster == 1) {
      ptx::tma_load<2>(to, &map, bar, at, ptx::L2Policy::normal);
    } else {
      ptx::tma_load_multicast(to, &map, bar, at, static_cast<uint16_t>((1 << cluster) - 1));
    }
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    nm24_linear_sm90_kernel(const __grid_constant__ Sm90Product product, const __grid_constant__ Sm90Rows x) {
#if SPARSEOPS_SM90A
  compute_product<Tile>(product, x);
#endif
}

}  // namespace sparseops
