// Rows on their way into a product: LayerNorm, conversion.
#pragma once

#include "gemm.h"
#include "transpose.h"

namespace {

// out[0, n) = x, zeros up to `padded`.
template <class T, class Out>
FK_INLINE void copy_row(const T* x, int64_t n, int64_t padded, Out* out) {
  int64_t i = 0;
  for (; i + FK_VL <= n; i += FK_VL) store(out + i, load(x + i));
  if (i < n && n >= FK_VL) {
    store(out + n - FK_VL, load(x + n - FK_VL));
    i = n;
  }
#ifdef __AVX512F__
  if (i < n) {
    store_tail(out + i, load_tail(x + i, n - i), n - i);
    i = n;
  }
#endif
  for (; i < n; ++i) from_float(out + i, to_float(x[i]));
  for (; i < padded; ++i) from_float(out + i, 0.0f);
}

// The same without the way through fp32.
typedef uint16_t vhh __attribute__((vector_size(FK_VL * 4), aligned(2), may_alias));
FK_INLINE void copy_row(const bf16* x, int64_t n, int64_t padded, bf16* out) {
  int64_t i = 0;
  for (; i + 2 * FK_VL <= n; i += 2 * FK_VL) *(vhh*)(out + i) = *(const vhh*)(x + i);
  for (; i + FK_VL <= n; i += FK_VL) *(vh*)(out + i) = *(const vh*)(x + i);
  for (; i < n; ++i) out[i] = x[i];
  for (; i < padded; ++i) out[i] = 0;
}

// out = x + y.
template <class T, class Out>
FK_INLINE void add_rows_into(const float* x, const T* y, int64_t n, Out* out) {
  int64_t i = 0;
  for (; i + FK_VL <= n; i += FK_VL) store(out + i, load(x + i) + load(y + i));
  for (; i < n; ++i) from_float(out + i, x[i] + to_float(y[i]));
}

// Adds values [at, at + n) of an array of the same dtype, if there is one.
template <class T>
FK_INLINE void add_array_row(const struct fk_array& from, int64_t at, int64_t n, T* to) {
  if (!from.data) return;
  const T* y = (const T*)from.data + at;
  int64_t i = 0;
  for (; i + FK_VL <= n; i += FK_VL) store(to + i, load(to + i) + load(y + i));
  for (; i < n; ++i) from_float(to + i, to_float(to[i]) + to_float(y[i]));
}

struct RowStatistics {
  float mean, rstd;
};

// Mean, then centred variance, both in fp32.
template <class T>
FK_INLINE RowStatistics row_statistics(const T* x, int64_t n, float eps) {
  int64_t whole = n / FK_VL * FK_VL;
  vf s0 = splat(0.0f), s1 = splat(0.0f);
  int64_t i = 0;
  for (; i + 2 * FK_VL <= whole; i += 2 * FK_VL) {
    s0 += load(x + i);
    s1 += load(x + i + FK_VL);
  }
  if (i < whole) s0 += load(x + i);
  float total = sum(s0 + s1);
  for (int64_t j = whole; j < n; ++j) total += to_float(x[j]);
  const float mean = total / (float)n;
  const vf m = splat(mean);
  s0 = s1 = splat(0.0f);
  for (i = 0; i + 2 * FK_VL <= whole; i += 2 * FK_VL) {
    vf a = load(x + i) - m, b = load(x + i + FK_VL) - m;
    s0 += a * a;
    s1 += b * b;
  }
  if (i < whole) {
    vf a = load(x + i) - m;
    s0 += a * a;
  }
  float square = sum(s0 + s1);
  for (int64_t j = whole; j < n; ++j) {
    float d = to_float(x[j]) - mean;
    square += d * d;
  }
  RowStatistics found = {mean, 1.0f / __builtin_sqrtf(square / (float)n + eps)};
  return found;
}

// One row by these statistics, zeros up to `padded`.
template <class T, class Out>
FK_INLINE void apply_norm_row(const T* x, int64_t n, int64_t padded, const struct fk_norm& norm, RowStatistics s,
                              Out* out) {
  const vf m = splat(s.mean), r = splat(s.rstd);
  int64_t i = 0;
  for (; i + FK_VL <= n; i += FK_VL)
    store(out + i, (load(x + i) - m) * r * load(norm.weight + i) + load(norm.bias + i));
  for (; i < n; ++i) from_float(out + i, (to_float(x[i]) - s.mean) * s.rstd * norm.weight[i] + norm.bias[i]);
  for (; i < padded; ++i) from_float(out + i, 0.0f);
}

// LayerNorm of one row.
template <class T, class Out>
FK_INLINE void normalize_row(const T* x, int64_t n, int64_t padded, const struct fk_norm& norm, Out* out) {
  if (norm.kind == FK_NO_NORM) return copy_row(x, n, padded, out);
  apply_norm_row(x, n, padded, norm, row_statistics(x, n, norm.eps), out);
}

// bf16 rows are widened once, not in each of the three passes; longer ones than this buffer are.
constexpr int64_t kWidenedRow = 1024;
template <class Out>
FK_INLINE void normalize_widened_row(const bf16* x, int64_t n, int64_t padded, const struct fk_norm& norm, Out* out) {
  if (n > kWidenedRow) return normalize_row(x, n, padded, norm, out);
  float row[kWidenedRow] __attribute__((aligned(64)));
  copy_row(x, n, n, row);
  normalize_row(row, n, padded, norm, out);
}

// Row `row` of a row-major array, LayerNorm'ed into `out`.
template <class Out>
FK_INLINE void normalize_row(const struct fk_array& x, int64_t row, int64_t n, int64_t padded,
                             const struct fk_norm& norm, Out* out) {
  if (x.dtype == FK_F32)
    normalize_row((const float*)x.data + row * n, n, padded, norm, out);
  else
    normalize_widened_row((const bf16*)x.data + row * n, n, padded, norm, out);
}

// GroupNorm's statistics of an image.
FK_INLINE RowStatistics group_statistics(const struct fk_norm& norm, int64_t image) {
  RowStatistics found = {norm.groups[2 * image], norm.groups[2 * image + 1]};
  return found;
}

// The row of `n` values at `offset` of an array by any norm.
template <class Out>
FK_INLINE void any_norm_row(const struct fk_array& x, int64_t offset, int64_t n, int64_t padded,
                            const struct fk_norm& norm, int64_t image, Out* out) {
  if (x.dtype == FK_F32) {
    const float* row = (const float*)x.data + offset;
    if (norm.kind == FK_GROUP_NORM) return apply_norm_row(row, n, padded, norm, group_statistics(norm, image), out);
    normalize_row(row, n, padded, norm, out);
  } else {
    const bf16* row = (const bf16*)x.data + offset;
    if (norm.kind == FK_GROUP_NORM) return apply_norm_row(row, n, padded, norm, group_statistics(norm, image), out);
    normalize_widened_row(row, n, padded, norm, out);
  }
}

}  // namespace
