// Matrices, 2:4 patterns and register layouts for the tests of the tensor cores' instructions, written down as the
// documents give them and apart from the emulator's own code. Lanes are numbered as in the PTX manual: lane = 4g + t.
#pragma once
#include <cstring>
#include <vector>

#include "test_support.h"

namespace sparseops_emulation {

template <class T>
using Matrix = std::vector<std::vector<T>>;
template <class T>
Matrix<T> matrix(int rows, int columns) {
  return Matrix<T>(rows, std::vector<T>(columns));
}

template <class T>
Matrix<T> random_matrix(int rows, int columns, Random& random) {
  auto m = matrix<T>(rows, columns);
  for (auto& row : m)
    for (T& v : row) v = random.number<T>();
  return m;
}

template <class T>
std::uint32_t bits_of(T v) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}

// ---- registers

struct Place {
  int row, column;
};
// Element e of a lane's: the 16-bit A of m16n8k16, and the compressed A of sparse ones.
inline Place a16(int lane, int e) {
  return {lane / 4 + (e == 2 || e == 3 || e > 5 ? 8 : 0), lane % 4 * 2 + e % 2 + (e > 3 ? 8 : 0)};
}
inline Place b16(int lane, int e) { return {e / 2 * 8 + lane % 4 * 2 + e % 2, lane / 4}; }
inline Place a8(int lane, int e) {
  return {lane / 4 + (e / 4 == 1 || e / 4 == 3 ? 8 : 0), lane % 4 * 4 + e % 4 + (e > 7 ? 16 : 0)};
}
inline Place b8(int lane, int e) { return {e / 4 * 16 + lane % 4 * 4 + e % 4, lane / 4}; }
inline Place d32(int lane, int i) { return {lane / 4 + (i > 1 ? 8 : 0), lane % 4 * 2 + i % 2}; }

// `matrix`, from row `first_row` on, in the registers of a warp: [lane][register].
template <class T, class Layout>
Buffer<std::uint32_t> fragment(const Matrix<T>& matrix, int registers, Layout layout, int first_row = 0) {
  constexpr int kOfRegister = 4 / sizeof(T);
  Buffer<std::uint32_t> fragment(32 * registers, 0);
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < registers * kOfRegister; ++e) {
      const Place place = layout(lane, e);
      fragment[lane * registers + e / kOfRegister] |= bits_of(matrix[first_row + place.row][place.column])
                                                      << 8 * sizeof(T) * (e % kOfRegister);
    }
  return fragment;
}

// ---- matrices that keep two of four

struct Sparse {
  int columns;
  std::vector<std::vector<unsigned>> nibble;  // [rows][columns / 4]
};

// The worked example of the documents: row r, group j keeps pair r + j of six.
inline constexpr unsigned kPairs[] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};
inline Sparse worked_example(int rows, int columns) {
  Sparse s{columns, std::vector(rows, std::vector<unsigned>(columns / 4))};
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < columns / 4; ++j) s.nibble[r][j] = kPairs[(r + j) % 6];
  return s;
}
inline Sparse random_pattern(int rows, int columns, Random& random) {
  Sparse s{columns, std::vector(rows, std::vector<unsigned>(columns / 4))};
  for (auto& row : s.nibble)
    for (unsigned& nibble : row) nibble = kPairs[random.below(6)];
  return s;
}

// The metadata of 16-bit elements, 32 words for each 16 rows. Only lanes with t = 2 * selector and 2 * selector + 1
// hold any; others hold `elsewhere`.
inline Buffer<std::uint32_t> metadata16(const Sparse& s, int selector, std::uint32_t elsewhere) {
  Buffer<std::uint32_t> words(s.nibble.size() * 2, elsewhere);
  for (std::size_t first = 0; first < s.nibble.size(); first += 16)
    for (int g = 0; g < 8; ++g)
      for (int q = 0; q < 2; ++q) {
        std::uint32_t word = 0;
        for (int j = 0; j < 4; ++j) {
          word |= s.nibble[first + g][4 * q + j] << 4 * j;
          word |= s.nibble[first + g + 8][4 * q + j] << (16 + 4 * j);
        }
        words[first * 2 + 4 * g + 2 * selector + q] = word;
      }
  return words;
}

inline Buffer<std::uint32_t> metadata8(const Sparse& s) {
  Buffer<std::uint32_t> words(s.nibble.size() * 2, 0);
  for (std::size_t i = 0; i < words.size(); ++i) {
    const int lane = int(i % 32);
    const auto& row = s.nibble[i / 32 * 16 + lane / 4 + lane % 2 * 8];
    for (int j = 0; j < 8; ++j) words[i] |= row[lane % 4 / 2 * 8 + j] << 4 * j;
  }
  return words;
}

inline void expect_words(const Buffer<std::uint32_t>& got, const std::vector<std::pair<int, std::uint32_t>>& expected) {
  for (const auto& [lane, word] : expected)
    if (got[lane] != word) throw Error("the metadata of lane " + std::to_string(lane) + " is not the documents'");
}

// sum_k dense[i][k] * b[k][j] in `Sum`, where dense holds the compressed values at the columns that the pattern keeps.
template <class Sum, class T>
Matrix<Sum> product(const Sparse& s, const Matrix<T>& compressed, const Matrix<T>& b) {
  auto sum = matrix<Sum>(int(s.nibble.size()), int(b[0].size()));
  for (std::size_t i = 0; i < sum.size(); ++i)
    for (int c = 0; c < s.columns / 2; ++c) {
      const unsigned nibble = s.nibble[i][c / 2];
      const int k = c / 2 * 4 + int(c % 2 ? nibble >> 2 : nibble & 3);
      for (std::size_t j = 0; j < b[k].size(); ++j)
        sum[i][j] += Sum(to_double(compressed[i][c])) * Sum(to_double(b[k][j]));
    }
  return sum;
}

// ---- shared memory

// Where the copy engine and the tensor cores have 16-byte chunk `chunk` of a region that begins at a multiple of 1024
// bytes, with chunks exchanged within `span` bytes (0: none): the manual's tables, PTX ISA 5.5.7.
inline int exchanged(int chunk, int span) {
  static constexpr int kTable[8][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5},
                                       {3, 2, 1, 0, 7, 6, 5, 4}, {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
                                       {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0}};
  const int lines = span / 16;  // of 128 bytes, after which the pattern repeats
  if (!lines) return chunk;
  const auto& line = kTable[chunk / 8 % lines];
  return chunk / 8 * 8 + int(std::find(line, line + 8, chunk % 8) - line);
}

}  // namespace sparseops_emulation
