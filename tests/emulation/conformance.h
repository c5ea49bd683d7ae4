// What the cases of conformance.cu are made of: operands, and how far a result may be from another's.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"

namespace conformance {

using Words = std::vector<uint32_t>;

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "conformance: %s\n", cudaGetErrorString(error));
  std::exit(2);
}

// ---- operands

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<uint32_t>((z ^ z >> 31) >> 16);
  }
  uint32_t below(uint32_t bound) { return next() % bound; }

 private:
  uint64_t state_;
};

enum class Numbers { integers, near_one, any };  // any: every finite pattern of f16; of bf16, what keeps sums finite

template <class T>
T element(Random& random, Numbers numbers) {
  return T(numbers == Numbers::integers ? static_cast<float>(random.below(17)) - 8
                                        : (static_cast<float>(random.below(4001)) - 2000) / 1000);
}

template <class T>
uint32_t bits16(Random& random, Numbers numbers) {
  if (numbers == Numbers::any) {
    const uint32_t bits = random.next() & 0xffff;
    if (sparseops::ptx::kIsHalf<T>) return (bits & 0x7c00) == 0x7c00 ? bits ^ 0x4000 : bits;
    return (bits & 0x807f) | (64 + random.below(100)) << 7;
  }
  const T t = element<T>(random, numbers);
  uint16_t bits;
  std::memcpy(&bits, &t, 2);
  return bits;
}

template <class T>
uint32_t pair(Random& random, Numbers numbers) {
  const uint32_t low = bits16<T>(random, numbers);
  return low | bits16<T>(random, numbers) << 16;
}

inline uint32_t sum_before(Random& random, Numbers numbers) {
  const float integer = static_cast<float>(random.below(2001)) - 1000;
  const float v = numbers == Numbers::integers ? integer : integer / 777;
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline uint32_t metadata(Random& random) {
  static const uint32_t kNibbles[] = {0x4, 0x8, 0x9, 0xc, 0xd, 0xe};
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) word |= kNibbles[random.below(6)] << 4 * i;
  return word;
}

// ---- cases

struct Case {
  std::string name;
  size_t in, out;         // words
  size_t line, out_line;  // of which so many are printed in one line
  std::function<cudaError_t(const uint32_t* in, uint32_t* out)> launch;
  std::function<void(Random&, Words&)> operands;
  // For outputs that are sums in f32 of other than integers: word i of the operands without its signs, and what part of
  // the sum of their terms' magnitudes results may differ by.
  std::function<uint32_t(size_t i, uint32_t word)> magnitude;
  double tolerance = 0;
};

constexpr double kF32Sum = 0x1p-20;  // the bound that the kernels' tests use

}  // namespace conformance
