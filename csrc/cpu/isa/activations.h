// The activations and their derivatives.
#pragma once

#include "gelu.h"
#include "vec.h"

namespace {

#ifndef __AVX512F__
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
#endif

template <bool Low, fk_activation Activation>
FK_INLINE vf activate(vf x) {
  switch (Activation) {
    case FK_GELU:
#ifdef __AVX512F__
      return gelu<Low>(x);
#else
      return x * normal_distribution<Low>(x);
#endif
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
#ifdef __AVX512F__
      return gelu<Low>(x, slope);
#else
      const vf below = normal_distribution<Low>(x);
      // The density at x: exp(-x^2 / 2) / sqrt(2 pi).
      *slope = below + x * (splat(0.398942280f) * exp2v<Low>(x * x * splat(-0.5f * 1.44269504f)));
      return x * below;
#endif
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
