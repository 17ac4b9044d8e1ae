// Backward of LayerNorm and of GroupNorm with one group, row by row.
#pragma once

#include "rows.h"

namespace {

template <class T>
FK_INLINE RowStatistics statistics_of(const T* x, int64_t n, const struct fk_norm& norm, int64_t image) {
  if (norm.kind == FK_GROUP_NORM) return {norm.groups[2 * image], norm.groups[2 * image + 1]};
  return row_statistics(x, n, norm.eps);
}

// The parts of a row's gradient, from column `i` on.
FK_INLINE vf load_grad(const struct fk_norm_backward& p, const float* row, int64_t i) {
  vf g = load(row + i);
  for (int64_t part = 1; part < p.parts; ++part) g += load(row + part * p.images * p.rows * p.grad_stride + i);
  return g;
}
FK_INLINE vf load_grad_tail(const struct fk_norm_backward& p, const float* row, int64_t i) {
  vf g = load_tail(row + i, p.columns - i);
  for (int64_t part = 1; part < p.parts; ++part)
    g += load_tail(row + part * p.images * p.rows * p.grad_stride + i, p.columns - i);
  return g;
}

// Calls body(i, width, x, grad, weight) for the vectors of a row; lanes beyond its end are zero.
template <class T, class Body>
FK_INLINE void each_vector(const struct fk_norm_backward& p, const T* x, const float* grad, Body body) {
  const bool affine = p.norm.kind != FK_NO_NORM;
  int64_t i = 0;
  for (; i + FK_VL <= p.columns; i += FK_VL)
    body(i, (int64_t)FK_VL, load(x + i), load_grad(p, grad, i), affine ? load(p.norm.weight + i) : splat(1.0f));
  if (i < p.columns)
    body(i, p.columns - i, load_tail(x + i, p.columns - i), load_grad_tail(p, grad, i),
         affine ? load_tail(p.norm.weight + i, p.columns - i) : splat(1.0f));
}

// Sums over a row of grad * weight, alone and times the normalised x.
template <class T>
FK_INLINE void row_totals(const struct fk_norm_backward& p, const T* x, const float* grad, const RowStatistics& s,
                          float* totals) {
  vf alone = splat(0.0f), times = splat(0.0f);
  const vf mean = splat(s.mean), rstd = splat(s.rstd);
  each_vector(p, x, grad, [&](int64_t, int64_t, vf v, vf g, vf weight) {
    const vf gw = g * weight;
    alone += gw;
    times += gw * ((v - mean) * rstd);
  });
  totals[0] = sum(alone);
  totals[1] = sum(times);
}

template <class T>
FK_INLINE void image_norm_row(const struct fk_norm_backward& p, const T* x, const float* grad, int64_t image, T* out,
                              float* sums) {
  if (p.norm.kind == FK_NO_NORM) {
    each_vector(p, x, grad, [&](int64_t i, int64_t width, vf, vf g, vf) {
      width == FK_VL ? store(out + i, g) : store_tail(out + i, g, width);
    });
    return;
  }
  const RowStatistics s = statistics_of(x, p.columns, p.norm, image);
  float means[2] = {};
  if (out) {
    if (p.norm.kind == FK_GROUP_NORM) {
      means[0] = p.means ? (float)p.means[2 * image] : 0.0f;
      means[1] = p.means ? (float)p.means[2 * image + 1] : 0.0f;
    } else {
      row_totals(p, x, grad, s, means);
      means[0] /= (float)p.columns;
      means[1] /= (float)p.columns;
    }
  }
  const vf mean = splat(s.mean), rstd = splat(s.rstd), alone = splat(means[0]), times = splat(means[1]);
  each_vector(p, x, grad, [&](int64_t i, int64_t width, vf v, vf g, vf weight) {
    const vf hat = (v - mean) * rstd;
    if (sums) {
      float* of_bias = sums + p.columns;
      if (width == FK_VL) {
        store(sums + i, load(sums + i) + g * hat);
        store(of_bias + i, load(of_bias + i) + g);
      } else {
        store_tail(sums + i, load_tail(sums + i, width) + g * hat, width);
        store_tail(of_bias + i, load_tail(of_bias + i, width) + g, width);
      }
    }
    if (!out) return;
    // A constant taken from values that are rounded already is off by the same everywhere, and that adds up.
    const vf dx = rstd * (g * weight - (alone + hat * times));
    width == FK_VL ? store(out + i, dx) : store_tail(out + i, dx, width);
  });
}

struct NormRows {
  int64_t image, first, count;
};
FK_INLINE NormRows norm_rows(const struct fk_norm_backward& p, int64_t task) {
  const int64_t first = task % p.tasks_per_image * p.rows_per_task;
  return {task / p.tasks_per_image, first, min64(p.rows_per_task, p.rows - first)};
}

template <class T>
FK_INLINE void norm_backward_task(const struct fk_norm_backward& p, int64_t task) {
  const NormRows r = norm_rows(p, task);
  float* sums = p.sums ? p.sums + task * 2 * p.columns : nullptr;
  for (int64_t i = 0; sums && i < 2 * p.columns; ++i) sums[i] = 0.0f;
  for (int64_t i = r.first; i < r.first + r.count; ++i) {
    const int64_t at = (r.image * (p.skipped + p.rows) + p.skipped + i) * p.columns;
    T* out = p.out ? (T*)p.out + at : nullptr;
    image_norm_row(p, (const T*)p.x.data + at, p.grad + (r.image * p.rows + i) * p.grad_stride, r.image, out, sums);
    if (out) add_array_row(p.own, at, p.columns, out);
  }
}

template <class T>
FK_INLINE void norm_totals_task(const struct fk_norm_backward& p, int64_t task) {
  const NormRows r = norm_rows(p, task);
  double* to = p.totals + 2 * task;
  to[0] = to[1] = 0.0;
  for (int64_t i = r.first; i < r.first + r.count; ++i) {
    const T* x = (const T*)p.x.data + (r.image * (p.skipped + p.rows) + p.skipped + i) * p.columns;
    float totals[2];
    row_totals(p, x, p.grad + (r.image * p.rows + i) * p.grad_stride, statistics_of(x, p.columns, p.norm, r.image),
               totals);
    to[0] += (double)totals[0];
    to[1] += (double)totals[1];
  }
}

void norm_backward(const struct fk_norm_backward* p, int64_t task) {
  if (p->x.dtype == FK_F32)
    norm_backward_task<float>(*p, task);
  else
    norm_backward_task<bf16>(*p, task);
}

// A block of rows of a result's gradient.
template <class T, class Out>
FK_INLINE void statistics_row(const struct fk_statistics_backward& p, int64_t row) {
  const int64_t image = row / p.rows, n = p.columns;
  const float values = (float)p.rows * (float)n;
  const vf mean = splat(p.statistics[2 * image]), base = splat(p.slopes[2 * image] / values);
  const vf slope = splat(2.0f * p.slopes[2 * image + 1] / values);
  const T* grad = (const T*)p.grad.data + row * n;
  const Out* out = (const Out*)p.out.data + row * n;
  float* to = p.to + row * n;
  int64_t i = 0;
  for (; i + FK_VL <= n; i += FK_VL) store(to + i, load(grad + i) + (base + slope * (load(out + i) - mean)));
  if (i < n)
    store_tail(to + i, load_tail(grad + i, n - i) + (base + slope * (load_tail(out + i, n - i) - mean)), n - i);
}

void statistics_backward(const struct fk_statistics_backward* p, int64_t task) {
  const int64_t first = task * p->rows_per_task, last = min64(first + p->rows_per_task, p->images * p->rows);
  for (int64_t row = first; row < last; ++row)
    if (p->grad.dtype == FK_F32)
      statistics_row<float, float>(*p, row);
    else
      statistics_row<bf16, bf16>(*p, row);
}

void norm_backward_totals(const struct fk_norm_backward* p, int64_t task) {
  if (p->x.dtype == FK_F32)
    norm_totals_task<float>(*p, task);
  else
    norm_totals_task<bf16>(*p, task);
}

}  // namespace
