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

#define FK_INLINE static inline __attribute__((always_inline))

namespace {

typedef float vf __attribute__((vector_size(FK_VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(FK_VL * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(FK_VL * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(FK_VL * 2), aligned(2), may_alias));

typedef uint16_t bf16;

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

// 2^f on [-1/2, 1/2]: minimax fit in relative error (9e-8, low: 1e-4), constant term fixed.
template <bool Low>
FK_INLINE vf exp2_fraction(vf f) {
  if (Low) {
    vf p = splat(5.500894477e-2f);
    p = p * f + splat(2.422109797e-1f);
    p = p * f + splat(6.932829263e-1f);
    return p * f + splat(1.0f);
  }
  vf p = splat(1.326472873e-3f);
  p = p * f + splat(9.671513013e-3f);
  p = p * f + splat(5.550733741e-2f);
  p = p * f + splat(2.402224208e-1f);
  p = p * f + splat(6.931469776e-1f);
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

// The normal distribution function at x: log2 of erfc(t / sqrt(2)) is a smooth function of t = |x|, fitted by a
// polynomial that weighs the error by erfc(t / sqrt(2)). Absolute error 5e-8, of x times the result as well (low: that
// of the latter is 6e-7).
template <bool Low>
FK_INLINE vf normal_distribution(vf x) {
  vf t = x < splat(0.0f) ? -x : x;
  t = t > splat(13.0f) ? splat(13.0f) : t;
  vf p;
  if (Low) {
    p = splat(-4.898555341e-4f);
    p = p * t + splat(7.211321663e-3f);
    p = p * t + splat(-5.217819197e-2f);
    p = p * t + splat(-4.595635379e-1f);
    p = p * t + splat(-1.151011803f);
  } else {
    p = splat(-2.834912804e-6f);
    p = p * t + splat(3.937769188e-5f);
    p = p * t + splat(-1.861802470e-4f);
    p = p * t + splat(-1.369363495e-4f);
    p = p * t + splat(7.063420094e-3f);
    p = p * t + splat(-5.249617832e-2f);
    p = p * t + splat(-4.592081967e-1f);
    p = p * t + splat(-1.151105205f);
  }
  const vf tail = exp2v<Low>(p * t - splat(1.0f));  // half of erfc
  return x < splat(0.0f) ? tail : splat(1.0f) - tail;
}

#ifdef __AVX512F__
// What GELU lacks of ReLU is r(t) = t Phi(-t) at t = |x|. Around every multiple of `kGeluStep` a parabola takes its
// place: an absolute error of 2e-5, and 1e-6 beyond the last, where r ends.
constexpr float kGeluStep = 0.1640625f;
alignas(64) constexpr float kGeluParabolas[3][32] = {
    {0.00000000e+00f, 7.13410974e-02f, 1.21868439e-01f, 1.53214723e-01f, 1.67889521e-01f, 1.68999955e-01f,
     1.59927055e-01f, 1.44007176e-01f, 1.24261916e-01f, 1.03206515e-01f, 8.27492550e-02f, 6.41779304e-02f,
     4.82164659e-02f, 3.51275392e-02f, 2.48359963e-02f, 1.70511603e-02f, 1.13726771e-02f, 7.37161236e-03f,
     4.64488985e-03f, 2.84576463e-03f, 1.69555470e-03f, 9.82602360e-04f, 5.53922902e-04f, 3.03787325e-04f,
     1.62096898e-04f, 8.41578367e-05f, 4.25162034e-05f, 2.09014215e-05f, 9.99946587e-06f, 4.65557059e-06f,
     2.10948997e-06f, 0.00000000e+00f},
    {4.99994218e-01f,  3.70480031e-01f,  2.47771889e-01f,  1.37887612e-01f,  4.53776047e-02f,  -2.70863399e-02f,
     -7.88294375e-02f, -1.11001939e-01f, -1.26179039e-01f, -1.27829671e-01f, -1.19761094e-01f, -1.05631366e-01f,
     -8.85919705e-02f, -7.10854456e-02f, -5.47898710e-02f, -4.06781882e-02f, -2.91496664e-02f, -2.01911591e-02f,
     -1.35343019e-02f, -8.78698938e-03f, -5.52939437e-03f, -3.37437261e-03f, -1.99795957e-03f, -1.14821782e-03f,
     -6.40684972e-04f, -3.47187975e-04f, -1.82761520e-04f, -9.34739728e-05f, -4.64576297e-05f, -2.24413307e-05f,
     -1.05371291e-05f, -5.00198657e-05f},
    {-3.98522556e-01f, -3.87996584e-01f, -3.57424319e-01f, -3.10447693e-01f, -2.52314478e-01f, -1.89100951e-01f,
     -1.26780614e-01f, -7.04081059e-02f, -2.35594604e-02f, 1.19028213e-02f,  3.57497074e-02f,  4.90638874e-02f,
     5.37848063e-02f,  5.22323251e-02f,  4.66983207e-02f,  3.91591266e-02f,  3.11232414e-02f,  2.35982649e-02f,
     1.71433855e-02f,  1.19687878e-02f,  8.04823264e-03f,  5.22120716e-03f,  3.27205774e-03f,  1.98286492e-03f,
     1.16290443e-03f,  6.60489080e-04f,  3.63496598e-04f,  1.93932996e-04f,  1.00344274e-04f,  5.03699157e-05f,
     2.45366682e-05f,  -4.28598636e-04f}};

FK_INLINE vf table32(const float* table, __m512i index) {
  return (vf)_mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
}

FK_INLINE vf gelu_low(vf x) {
  const __m512 most = _mm512_set1_ps(31.0f * kGeluStep);
  const vf t = (vf)_mm512_min_ps(_mm512_abs_ps((__m512)x), most);  // for a NaN the latter
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded number in the low bits
  const vf shifted = t * splat(1.0f / kGeluStep) + magic;
  const __m512i index = (__m512i)shifted;
  const vf f = t - (shifted - magic) * splat(kGeluStep);
  const vf r = (table32(kGeluParabolas[2], index) * f + table32(kGeluParabolas[1], index)) * f +
               table32(kGeluParabolas[0], index);
  return (vf)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x) - r;  // a NaN stays a NaN
}
#endif

template <bool Low, fk_activation Activation>
FK_INLINE vf activate(vf x) {
  switch (Activation) {
    case FK_GELU:
#ifdef __AVX512F__
      if (Low) return gelu_low(x);
#endif
      return x * normal_distribution<Low>(x);
    case FK_QUICK_GELU:
      return x * sigmoid<Low>(x, 1.702f);
    case FK_SILU:
      return x * sigmoid<Low>(x, 1.0f);
    case FK_RELU:
      return x < splat(0.0f) ? splat(0.0f) : x;  // a NaN stays a NaN
    default:
      return x;
  }
}

// The same, and its derivative.
template <bool Low, fk_activation Activation>
FK_INLINE vf activate(vf x, vf* slope) {
  constexpr float kFactor = Activation == FK_QUICK_GELU ? 1.702f : 1.0f;
  switch (Activation) {
    case FK_GELU: {
      const vf below = normal_distribution<Low>(x);
      // The density at x: exp(-x^2 / 2) / sqrt(2 pi).
      *slope = below + x * (splat(0.398942280f) * exp2v<Low>(x * x * splat(-0.5f * 1.44269504f)));
      return x * below;
    }
    case FK_QUICK_GELU:
    case FK_SILU: {
      const vf s = sigmoid<Low>(x, kFactor);
      *slope = s + x * s * (splat(kFactor) - splat(kFactor) * s);
      return x * s;
    }
    case FK_RELU:
      *slope = x > splat(0.0f) ? splat(1.0f) : splat(0.0f);
      return x < splat(0.0f) ? splat(0.0f) : x;
    default:
      *slope = splat(1.0f);
      return x;
  }
}

// Calls `body` with a compile-time activation in place of the one known at run time.
template <fk_activation Activation>
struct activation_constant {
  static constexpr fk_activation value = Activation;
};
template <class Body>
FK_INLINE void with_activation(fk_activation activation, Body body) {
  switch (activation) {
    case FK_GELU:
      return body(activation_constant<FK_GELU>());
    case FK_QUICK_GELU:
      return body(activation_constant<FK_QUICK_GELU>());
    case FK_SILU:
      return body(activation_constant<FK_SILU>());
    case FK_RELU:
      return body(activation_constant<FK_RELU>());
    default:
      return body(activation_constant<FK_NO_ACTIVATION>());
  }
}

}  // namespace
