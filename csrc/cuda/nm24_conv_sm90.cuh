// nm24_conv (nm24_conv.cuh has the formula) by wgmma.sp: f16 and bf16, one group, channels a multiple of 64.
//
//   x [batch, height, width, channels], w [rows, (r, s, c)] as values and slabs, y [batch, out_height, out_width, rows]
//
// The product of nm24_linear_sm90.cuh, whose tokens are output pixels. An atom of 64 columns lies within one tap of the
// filter, and the copy engine fetches the pixels under that tap for consecutive output pixels, across rows and images,
// with zeros for those outside the image. So no pixel is gathered by a thread.
// State: it has not yet run on a GPU; tests/emulation runs it on the CPU.
#pragma once
#include "cuda/epilogue_sm90.cuh"

namespace sparseops {

// The pixels under one tap of the filter for consecutive output pixels, tap after tap, 64 channels at a time.
struct Sm90Pixels {
  CUtensorMap map;
  int channels, kernel_w, kernel_h, out_width, out_height;
  int stride_w, stride_h, pad_left, pad_top, dilation_w, dilation_h;

  struct Cursor {
    int w, h, n;        // of the pixel under the first tap, for the first output pixel
    int channel, s, r;  // of the tap
  };
  SPARSEOPS_DEVICE Cursor start(int atom, int token) const {
    const int tap = atom * 64 / channels, row = token / out_width;
    return {token % out_width * stride_w - pad_left,
            row % out_height * stride_h - pad_top,
            row / out_height,
            atom * 64 % channels,
            tap % kernel_w,
            tap / kernel_w};
  }

  SPARSEOPS_DEVICE void load(Cursor& cursor, uint32_t to, uint32_t bar, int cluster) const {
    // The last stage may be half a stage: what then lies past the last tap is read past the last channel, as zeros.
    const bool exists = cursor.r < kernel_h;
    const int at[] = {exists ? cursor.channel : channels, cursor.w, cursor.h, cursor.n};
    const auto offset_w = static_cast<uint16_t>(cursor.s * dilation_w);
    const auto offset_h = static_cast<uint16_t>(exists ? cursor.r * dilation_h : 0);
    if (cluster == 1) {
      ptx::tma_load_im2col(to, &map, bar, at, offset_w, offset_h);
    } else {
      ptx::tma_load_im2col_multicast(to, &map, bar, at, offset_w, offset_h, static_cast<uint16_t>((1 << cluster) - 1));
    }
    cursor.channel += 64;
    if (cursor.channel < channels) return;
    cursor.channel = 0;
    if (++cursor.s < kernel_w) return;
    cursor.s = 0;
    ++cursor.r;
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    nm24_conv_sm90_kernel(const __grid_constant__ Sm90Product product, const __grid_constant__ Sm90Pixels x) {
#if SPARSEOPS_SM90A
  compute_product<Tile>(product, x);
#endif
}

}  // namespace sparseops
