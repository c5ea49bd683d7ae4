// The widest float vector of the instruction set this file is compiled for, and what the kernels do with it.
//
// Kernels are written once over GCC's and Clang's vector types; the build compiles them once per instruction set
// (-DSPARSEOPS_ISA=avx2 and so on), each into a namespace of that name. Nothing here or in a kernel may use inline
// functions of the standard library: the linker keeps one copy of those for everybody, perhaps one that was compiled
// for a processor that this one is not.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 intrinsics start from undefined vectors
#endif

namespace sparseops {
namespace SPARSEOPS_ISA {

#if defined(SPARSEOPS_VECTOR_BYTES)  // tests compile the wide kernels for narrower processors
constexpr int kVectorBytes = SPARSEOPS_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef float VecUnaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16)));
typedef float QuadUnaligned __attribute__((vector_size(16), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// 16-bit floats are stored types only: every sum is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift exponent and mantissa into place, then rescale by 2^112: subnormals come out right by that multiplication.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  if ((x.bits & 0x7c00) == 0x7c00) return float_of(sign | 0x7f800000 | magnitude);
  return float_of(sign | bits_of(float_of(magnitude) * float_of(0x77800000)));
#endif
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  const uint32_t u = bits_of(x);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void from_float(float x, Half* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, 0);
#else
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: let the addition of 0.5 round at bit 2^-24
    out->bits = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
  } else {
    out->bits = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
#endif
}

inline Quad load_quad(const float* p) { return *reinterpret_cast<const QuadUnaligned*>(p); }
template <class T>
inline Quad load_quad(const T* p) {
  return Quad{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
#if defined(__AVX2__)
inline Quad load_quad(const BFloat16* p) {
  const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Quad>(_mm_slli_epi32(wide, 16));
}
#endif
#if defined(__F16C__)
inline Quad load_quad(const Half* p) {
  return reinterpret_cast<Quad>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#endif

inline void store_quad(float* p, Quad q) { *reinterpret_cast<QuadUnaligned*>(p) = q; }
template <class T>
inline void store_quad(T* p, Quad q) {
  for (int i = 0; i < 4; ++i) from_float(q[i], p + i);
}

// The intrinsics behind the few operations that vector types cannot express well; tests that widen the vectors beyond
// the processor's take the plain bodies.
#if defined(SPARSEOPS_VECTOR_BYTES)
#define SPARSEOPS_PLAIN_VECTORS
#elif defined(__AVX512F__)
#define SPARSEOPS_AVX512
#elif defined(__AVX2__)
#define SPARSEOPS_AVX2
#else
#define SPARSEOPS_PLAIN_VECTORS
#endif

// A vector of the quads get(0), get(1), ...
template <class Get>
inline Vec join_quads(const Get& get) {
#if defined(SPARSEOPS_AVX512)
  const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(get(0)), get(1), 1);
  return _mm512_insertf32x4(_mm512_insertf32x4(low, get(2), 2), get(3), 3);
#elif defined(SPARSEOPS_AVX2)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(get(0)), get(1), 1);
#else
  Vec out;
  for (int i = 0; i < kLanes / 4; ++i) {
    const Quad quad = get(i);
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = quad[lane];
  }
  return out;
#endif
}

// put(i, quad) for each quad of a vector.
template <class Put>
inline void split_quads(Vec v, const Put& put) {
#if defined(SPARSEOPS_AVX512)
  put(0, _mm512_castps512_ps128(v)), put(1, _mm512_extractf32x4_ps(v, 1));
  put(2, _mm512_extractf32x4_ps(v, 2)), put(3, _mm512_extractf32x4_ps(v, 3));
#elif defined(SPARSEOPS_AVX2)
  put(0, _mm256_castps256_ps128(v)), put(1, _mm256_extractf128_ps(v, 1));
#else
  for (int i = 0; i < kLanes / 4; ++i) put(i, Quad{v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]});
#endif
}

typedef int32_t Indices __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512BF16__) || defined(SPARSEOPS_EMULATE_BF16_DOT)
#define SPARSEOPS_BF16_DOT
// sum += a.low * b.low + a.high * b.high, where each lane of a and b holds two bfloat16.
inline Vec dot_pairs(Vec sum, Vec a, Vec b) {
#if defined(SPARSEOPS_EMULATE_BF16_DOT)
  const Words x = reinterpret_cast<Words>(a), y = reinterpret_cast<Words>(b);
  sum += reinterpret_cast<Vec>(x << 16) * reinterpret_cast<Vec>(y << 16);
  return sum + reinterpret_cast<Vec>(x & 0xffff0000u) * reinterpret_cast<Vec>(y & 0xffff0000u);
#else
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
}
#endif

// The same four floats in every quad of lanes.
inline Vec broadcast_quad(const float* p) {
#if defined(SPARSEOPS_AVX512)
  return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(SPARSEOPS_AVX2)
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
  return join_quads([&](int) { return load_quad(p); });
#endif
}

// Lane `kLane` of each quad, in all four of its lanes.
template <int kLane>
inline Vec spread(Vec quads) {
#if defined(SPARSEOPS_AVX512)
  return _mm512_permute_ps(quads, kLane * 0x55);
#elif defined(SPARSEOPS_AVX2)
  return _mm256_permute_ps(quads, kLane * 0x55);
#else
  Vec out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = quads[lane / 4 * 4 + kLane];
  return out;
#endif
}

// In each lane, the element of its quad that the low two bits of that lane's index name.
inline Vec select(Vec quads, Indices index) {
#if defined(SPARSEOPS_AVX512)
  return _mm512_permutevar_ps(quads, reinterpret_cast<__m512i>(index));
#elif defined(SPARSEOPS_AVX2)
  return _mm256_permutevar_ps(quads, reinterpret_cast<__m256i>(index));
#else
  Vec out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = quads[lane / 4 * 4 + (index[lane] & 3)];
  return out;
#endif
}

// The first two lanes of each quad of `a`, the last two of `b`.
inline Vec blend_halves(Vec a, Vec b) {
#if defined(SPARSEOPS_AVX512)
  return _mm512_mask_blend_ps(0xcccc, a, b);
#elif defined(SPARSEOPS_AVX2)
  return _mm256_blend_ps(a, b, 0xcc);
#else
  for (int lane = 0; lane < kLanes; ++lane)
    if (lane & 2) a[lane] = b[lane];
  return a;
#endif
}

// Transposes the 4x4 block that rows a, b, c, d form in each quad of lanes.
inline void transpose_quads(Vec& a, Vec& b, Vec& c, Vec& d) {
#if defined(SPARSEOPS_AVX512)
  const __m512 ab0 = _mm512_unpacklo_ps(a, b), ab1 = _mm512_unpackhi_ps(a, b);
  const __m512 cd0 = _mm512_unpacklo_ps(c, d), cd1 = _mm512_unpackhi_ps(c, d);
  a = _mm512_shuffle_ps(ab0, cd0, 0x44), b = _mm512_shuffle_ps(ab0, cd0, 0xee);
  c = _mm512_shuffle_ps(ab1, cd1, 0x44), d = _mm512_shuffle_ps(ab1, cd1, 0xee);
#elif defined(SPARSEOPS_AVX2)
  const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
  const __m256 cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(ab0, cd0, 0x44), b = _mm256_shuffle_ps(ab0, cd0, 0xee);
  c = _mm256_shuffle_ps(ab1, cd1, 0x44), d = _mm256_shuffle_ps(ab1, cd1, 0xee);
#else
  const Vec rows[4] = {a, b, c, d};
  Vec* const out[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < kLanes; ++lane) (*out[i])[lane] = rows[lane % 4][lane / 4 * 4 + i];
#endif
}

#if defined(SPARSEOPS_AVX512) || defined(SPARSEOPS_AVX2)
#define SPARSEOPS_WORD_TRANSPOSE
// out[i][row] = rows[row][index + i], 8 by 8 elements of 16 bits.
inline void transpose_words(const uint16_t* const* rows, int64_t index, uint16_t* const* out) {
  __m128i r[8], pairs[8], quads[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + index));
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
    pairs[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int half = 0; half < 2; ++half) {
      quads[i + 2 * half] = _mm_unpacklo_epi32(pairs[i + half], pairs[i + half + 2]);
      quads[i + 2 * half + 1] = _mm_unpackhi_epi32(pairs[i + half], pairs[i + half + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[2 * i]), _mm_unpacklo_epi64(quads[i], quads[i + 4]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[2 * i + 1]), _mm_unpackhi_epi64(quads[i], quads[i + 4]));
  }
}
#endif

// kLanes consecutive elements, widened.
inline Vec load_wide(const float* p) { return load(p); }
template <class T>
inline Vec load_wide(const T* p) {
  return join_quads([&](int quad) { return load_quad(p + 4 * quad); });
}

inline float sum_of_lanes(Vec v) {
  float lanes[kLanes], sum = 0.0f;
  store(lanes, v);
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Four consecutive elements of each of kLanes rows: element `index + i` of all rows in out[i].
template <class T>
inline void load_columns(const T* const* rows, int64_t index, Vec* out) {
  for (int i = 0; i < 4; ++i) out[i] = join_quads([&](int quad) { return load_quad(rows[4 * quad + i] + index); });
  transpose_quads(out[0], out[1], out[2], out[3]);
}

}  // namespace SPARSEOPS_ISA
}  // namespace sparseops
