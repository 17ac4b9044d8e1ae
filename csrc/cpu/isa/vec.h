// Vectors of FK_VL floats from GCC's vector extensions, and the few functions the kernels need on them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#ifdef __AVX512F__
// GCC 12 takes the deliberately undefined operands inside its own intrinsics for uninitialised variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include "../kernels.h"

#ifndef FK_AMX
#define FK_AMX 0
#endif

#define FK_INLINE static inline __attribute__((always_inline))

namespace {

typedef float vf __attribute__((vector_size(FK_VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(FK_VL * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(FK_VL * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(FK_VL * 2), aligned(2), may_alias));

typedef uint16_t bf16;

FK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
FK_INLINE int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
FK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

FK_INLINE vf splat(float x) { return x - (vf){}; }
FK_INLINE vf load(const float* p) { return *(const vf*)p; }
FK_INLINE void store(float* p, vf x) { *(vf*)p = x; }
FK_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
FK_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

FK_INLINE vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16); }

// Round to nearest even; a NaN stays a NaN.
FK_INLINE void store(bf16* p, vf x) {
#if FK_NATIVE_BF16
  *(vh*)p = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  *(vh*)p = __builtin_convertvector((vu)(x == x ? (vi)rounded : (vi)quiet), vh);
#endif
}

#if FK_NATIVE_BF16
// Two vectors as pairs: lane i holds low[i] in its lower and high[i] in its upper half.
FK_INLINE vu pair_bf16(vf low, vf high) {
  const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(order, bits);
}
#endif

FK_INLINE float to_float(float x) { return x; }
FK_INLINE float to_float(bf16 x) {
  union {
    uint32_t u;
    float f;
  } v;
  v.u = (uint32_t)x << 16;
  return v.f;
}

FK_INLINE void from_float(float* p, float x) { *p = x; }
FK_INLINE void from_float(bf16* p, float x) {
  union {
    float f;
    uint32_t u;
  } v;
  v.f = x;
  *p = x == x ? (bf16)((v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16) : (bf16)((v.u >> 16) | 0x40u);
}

// Partial vectors at the end of a row: absent lanes read as zero and are not written.
#ifdef __AVX512F__
FK_INLINE uint32_t lanes_mask(int64_t n) { return ((uint32_t)1 << n) - 1; }
FK_INLINE vf load_tail(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)lanes_mask(n), p); }
FK_INLINE vf load_tail(const bf16* p, int64_t n) {
  const vh low = (vh)_mm256_maskz_loadu_epi16((__mmask16)lanes_mask(n), p);
  return (vf)(__builtin_convertvector(low, vu) << 16);
}
FK_INLINE void store_tail(float* p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)lanes_mask(n), (__m512)x); }
FK_INLINE void store_tail(bf16* p, vf x, int64_t n) {
  vh low;
  store((bf16*)&low, x);
  _mm256_mask_storeu_epi16(p, (__mmask16)lanes_mask(n), (__m256i)low);
}
#else
template <class T>
FK_INLINE vf load_tail(const T* p, int64_t n) {
  float lanes[FK_VL] __attribute__((aligned(64))) = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

template <class T>
FK_INLINE void store_tail(T* p, vf x, int64_t n) {
  float lanes[FK_VL] __attribute__((aligned(64)));
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) from_float(p + i, lanes[i]);
}
#endif

FK_INLINE float sum(vf x) {
  float lanes[FK_VL] __attribute__((aligned(64)));
  store(lanes, x);
  typedef float v4 __attribute__((vector_size(16), aligned(16), may_alias));
  v4 s = *(v4*)lanes;
  for (int i = 4; i < FK_VL; i += 4) s += *(v4*)(lanes + i);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// Elementary functions come in two qualities: for results kept in fp32, and (`Low`) for results rounded to bf16 at
// once, whose errors of 1e-4 vanish behind that rounding (4e-3).

// 2^f on [-1/2, 1/2]: minimax fit in relative error (2e-9, low: 1e-4), constant term fixed.
template <bool Low>
FK_INLINE vf exp2_fraction(vf f) {
  if (Low) {
    vf p = splat(5.500894477e-2f);
    p = p * f + splat(2.422109797e-1f);
    p = p * f + splat(6.932829263e-1f);
    return p * f + splat(1.0f);
  }
  vf p = splat(1.535336191e-4f);
  p = p * f + splat(1.339887441e-3f);
  p = p * f + splat(9.618437358e-3f);
  p = p * f + splat(5.550332471e-2f);
  p = p * f + splat(2.402264791e-1f);
  p = p * f + splat(6.931472029e-1f);
  return p * f + splat(1.0f);
}

// 2^x for x <= 127, zero where that would be denormal (arithmetic on denormals is slow); NaN for NaN.
template <bool Low>
FK_INLINE vf exp2v(vf x) {
#ifdef __AVX512F__
  const __m512 n = _mm512_roundscale_ps((__m512)x, 0);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)exp2_fraction<Low>(x - (vf)n), n);
#else
  x = splat(-127.0f) > x ? splat(-127.0f) : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const vf shifted = x + magic;
  const vi exponent = ((vi)shifted - (vi)magic + 127) << 23;
  return exp2_fraction<Low>(x - (shifted - magic)) * (vf)exponent;
#endif
}

template <bool Low>
FK_INLINE vf reciprocal(vf x) {
#ifdef __AVX512F__
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return Low ? r : r * (splat(2.0f) - x * r);  // one Newton step: 14 bits become 28
#else
  return splat(1.0f) / x;
#endif
}

// 1 / (1 + exp(-factor x)).
template <bool Low>
FK_INLINE vf sigmoid(vf x, float factor) {
  const vf e = x * splat(factor * -1.44269504f);
  return reciprocal<Low>(splat(1.0f) + exp2v<Low>(vmin(e, splat(126.0f))));
}

}  // namespace
