// Sums from which mean and variance of whole images follow, for GroupNorm with one group.
//
// Every row contributes its mean m, the squares around it, and m^2; they are added in double. So a result does not
// depend on how rows are cut into tasks, and a large mean does not swallow a small variance.
#pragma once

#include "rows.h"

namespace {

template <class T>
FK_INLINE void add_row(const T* x, int64_t n, double* sums) {
  const int64_t whole = n / FK_VL * FK_VL;
  vf total = splat(0.0f), squares = splat(0.0f);
  for (int64_t i = 0; i < whole; i += FK_VL) total += load(x + i);
  float s = sum(total);
  for (int64_t i = whole; i < n; ++i) s += to_float(x[i]);
  const float mean = s / (float)n;
  const vf m = splat(mean);
  for (int64_t i = 0; i < whole; i += FK_VL) {
    const vf d = load(x + i) - m;
    squares += d * d;
  }
  float square = sum(squares);
  for (int64_t i = whole; i < n; ++i) {
    const float d = to_float(x[i]) - mean;
    square += d * d;
  }
  sums[0] += (double)mean;
  sums[1] += (double)square;
  sums[2] += (double)mean * (double)mean;
}

FK_INLINE void add_rows(const void* x, fk_dtype dtype, int64_t offset, int64_t rows, int64_t n, double* sums) {
  for (int64_t i = 0; i < rows; ++i)
    if (dtype == FK_F32)
      add_row((const float*)x + offset + i * n, n, sums);
    else
      add_row((const bf16*)x + offset + i * n, n, sums);
}

void moments(const struct fk_moments* p, int64_t task) {
  const int64_t image = task / p->tasks_per_image, first = task % p->tasks_per_image * p->rows_per_task;
  const int64_t rows = min64(p->rows_per_task, p->rows - first);
  const int64_t start = image * (p->skipped + p->rows) + p->skipped + first;
  double* sums = p->sums + 3 * task;
  sums[0] = sums[1] = sums[2] = 0.0;
  add_rows(p->x.data, p->x.dtype, start * p->columns, rows, p->columns, sums);
}

}  // namespace
