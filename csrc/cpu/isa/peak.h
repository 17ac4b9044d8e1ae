// The machine's multiply-add rate as the microkernel could reach it: independent sums, operands in registers.
#pragma once

#include "gemm.h"

namespace {

#if !FK_AMX
static __attribute__((noinline)) void spin(vf* sums, int64_t iterations) {
  vf c[12];
  for (int i = 0; i < 12; ++i) c[i] = sums[i];
  const vf a = splat(0.999f), b = splat(1e-3f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) c[i] = c[i] * a + b;
  }
  for (int i = 0; i < 12; ++i) sums[i] = c[i];
}
#endif

#if FK_AMX
static __attribute__((noinline)) void spin_amx(int64_t iterations) {
  alignas(64) static const bf16 zeros[kAmxRows * kAmxDepth] = {};
  amx_load<2>(zeros, 64);
  amx_load<3>(zeros, 64);
  amx_clear<0>();
  amx_clear<1>();
  for (int64_t n = 0; n < iterations; ++n) {
    amx_multiply<0, 2, 3>();
    amx_multiply<1, 2, 3>();
  }
}
#elif FK_NATIVE_BF16
static __attribute__((noinline)) void spin_bf16(vf* sums, int64_t iterations) {
  __m512 c[12];
  for (int i = 0; i < 12; ++i) c[i] = (__m512)sums[i];
  const __m512bh one = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) c[i] = _mm512_dpbf16_ps(c[i], one, one);
  }
  for (int i = 0; i < 12; ++i) sums[i] = (vf)c[i];
}
#endif

double peak(int32_t low_precision, int64_t iterations) {
#if FK_AMX
  amx_acquire();
  spin_amx(iterations);
  amx_release();
  return 2.0 * kAmxRows * kAmxDepth * 16 * 2.0 * (double)iterations / (low_precision ? 1 : kAmxPartProducts);
#else
  vf sums[12] = {};
#if FK_NATIVE_BF16
  if (low_precision) {
    spin_bf16(sums, iterations);
    return 12.0 * FK_VL * 4.0 * (double)iterations;
  }
#endif
  (void)low_precision;
  spin(sums, iterations);
  // The sums are used, so the loop cannot be left out.
  return 12.0 * FK_VL * 2.0 * (double)iterations + (double)(sum(sums[0]) > 1e30f);
#endif
}

}  // namespace
