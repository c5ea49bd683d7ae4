// The values of the bits that the tensor cores multiply.
#pragma once
#include <array>
#include <bit>
#include <cstdint>

namespace sparseops_emulation {

// Without branches: this is much of what a test's time goes into.
inline float value_of_f16(std::uint32_t bits) {
  bits &= 0xffff;
  const std::uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity, NaN
  const float magnitude = std::bit_cast<float>((bits & 0x7fff) << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | special | (bits & 0x8000) << 16);
}

inline float value_of_bf16(std::uint32_t bits) { return std::bit_cast<float>(bits << 16); }

// Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, and one NaN of each sign.
inline float value_of_e4m3(std::uint8_t bits) {
  static constexpr std::array<float, 256> kValues = [] {
    std::array<float, 256> values{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      const std::uint32_t exponent = i >> 3 & 15, mantissa = i & 7, sign = (i & 0x80) << 24;
      const std::uint32_t normal = (exponent + 127 - 7) << 23 | mantissa << 20;
      const float small = static_cast<float>(mantissa) * 0x1p-9f;
      const std::uint32_t magnitude = exponent == 0     ? std::bit_cast<std::uint32_t>(small)
                                      : (i & 127) < 127 ? normal
                                                        : 0x7fc00000;
      values[i] = std::bit_cast<float>(magnitude | sign);
    }
    return values;
  }();
  return kValues[bits];
}

}  // namespace sparseops_emulation
