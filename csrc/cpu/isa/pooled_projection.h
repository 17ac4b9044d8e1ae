// Average pooling of a map by squares, and the linear behind it, with GroupNorm in front of each.
#pragma once

#include "moments.h"

namespace {

// The average of one square of an image.
template <class T>
FK_INLINE void pool_pixel(const struct fk_pooled_projection& p, const T* image, int64_t pixel, float* to) {
  const int64_t top = pixel / p.pooled_w * p.kernel, left = pixel % p.pooled_w * p.kernel;
  const int64_t bottom = min64(top + p.kernel, p.height), right = min64(left + p.kernel, p.width);
  const int64_t n = p.channels, whole = n / FK_VL * FK_VL;
  const float share = 1.0f / (float)((bottom - top) * (right - left));
  for (int64_t c = 0; c < whole; c += FK_VL) {
    vf total = splat(0.0f);
    for (int64_t y = top; y < bottom; ++y) {
      const T* x = image + (y * p.width + left) * n + c;
      vf line = splat(0.0f);
      for (int64_t i = left; i < right; ++i, x += n) line += load(x);
      total += line;
    }
    store(to + c, total * splat(share));
  }
  for (int64_t c = whole; c < n; ++c) {
    float total = 0.0f;
    for (int64_t y = top; y < bottom; ++y) {
      float line = 0.0f;
      for (int64_t i = left; i < right; ++i) line += to_float(image[(y * p.width + i) * n + c]);
      total += line;
    }
    to[c] = total * share;
  }
}

void pool(const struct fk_pooled_projection* p, int64_t task) {
  const int64_t rows = p->pooled_h * p->pooled_w, n = p->channels;
  const int64_t image = task / p->pools_per_image, first = task % p->pools_per_image * p->pixels_per_pool;
  const int64_t last = min64(first + p->pixels_per_pool, rows), start = image * p->height * p->width * n;
  double* sums = p->moments ? p->moments + 3 * task : nullptr;
  if (sums) sums[0] = sums[1] = sums[2] = 0.0;
  for (int64_t i = first; i < last; ++i) {
    float* to = p->pooled + (image * rows + i) * n;
    if (p->x.dtype == FK_F32)
      pool_pixel(*p, (const float*)p->x.data + start, i, to);
    else
      pool_pixel(*p, (const bf16*)p->x.data + start, i, to);
    if (p->in_norm.kind == FK_GROUP_NORM) apply_norm_row(to, n, n, p->in_norm, group_statistics(p->in_norm, image), to);
    if (sums) add_row(to, n, sums);
  }
}

// A row of the map: every pixel gets its share of its square's gradient.
template <class T>
FK_INLINE void pool_backward_row(const struct fk_pool_backward& b, int64_t row) {
  const struct fk_pooled_projection& p = b.forward;
  const int64_t image = row / p.height, y = row % p.height, n = p.channels, above = y / p.kernel;
  const int64_t high = min64((above + 1) * p.kernel, p.height) - above * p.kernel;
  const float values = (float)(p.height * p.width) * (float)n;
  const vf mean = splat(b.groups ? b.groups[2 * image] : 0.0f);
  const vf base = splat(b.groups ? b.of_statistics[2 * image] / values : 0.0f);
  const vf slope = splat(b.groups ? 2.0f * b.of_statistics[2 * image + 1] / values : 0.0f);
  for (int64_t x = 0; x < p.width; ++x) {
    const int64_t beside = x / p.kernel, at = (row * p.width + x) * n;
    const int64_t wide = min64((beside + 1) * p.kernel, p.width) - beside * p.kernel;
    const bool pooled = above < p.pooled_h && beside < p.pooled_w;
    const float* from = b.slopes + ((image * p.pooled_h + above) * p.pooled_w + beside) * n;
    const vf share = splat(1.0f / (float)(high * wide));
    const T* value = (const T*)p.x.data + at;
    T* to = (T*)b.dx + at;
    auto grad = [&](vf g, vf v) { return b.groups ? g * share + (base + slope * (v - mean)) : g * share; };
    int64_t c = 0;
    for (; c + FK_VL <= n; c += FK_VL)
      store(to + c, grad(pooled ? load(from + c) : splat(0.0f), b.groups ? load(value + c) : splat(0.0f)));
    if (c < n)
      store_tail(
          to + c,
          grad(pooled ? load_tail(from + c, n - c) : splat(0.0f), b.groups ? load_tail(value + c, n - c) : splat(0.0f)),
          n - c);
  }
}

void pool_backward(const struct fk_pool_backward* p, int64_t row) {
  if (p->forward.x.dtype == FK_F32)
    pool_backward_row<float>(*p, row);
  else
    pool_backward_row<bf16>(*p, row);
}

FK_INLINE int64_t pooled_row_stride(const struct fk_pooled_projection& p) { return round_up(p.channels, 2) + kRowPad; }

template <class A>
FK_INLINE void project_task(const struct fk_pooled_projection& p, int64_t task, void* scratch) {
  A* rows = (A*)scratch;
  const int64_t lda = pooled_row_stride(p), all = p.pooled_h * p.pooled_w, n = p.channels;
  const int64_t group = task % p.panel_groups, block = task / p.panel_groups;
  const int64_t image = block / p.tasks_per_image, first = block % p.tasks_per_image * p.rows_per_task;
  const int64_t height = min64(p.rows_per_task, all - first), start = image * all + first;
  const int64_t panels = ceil_div(p.linear.n, kPanel), each = ceil_div(panels, p.panel_groups);
  const int64_t from = min64(group * each, panels), to = min64(from + each, panels);
  const struct fk_array pooled = {p.pooled, FK_F32, 0};
  for (int64_t i = 0; i < height; ++i)
    any_norm_row(pooled, (start + i) * n, n, round_up(n, 2), p.norm, image, rows + i * lda);
  const struct fk_array no_residual = {nullptr, FK_F32, 0};
  product(
      rows, lda, height, p.linear, from, to,
      [&](int64_t row, int64_t tile_rows, int64_t column, const float* sums) {
        write_tile(sums, kPanel, tile_rows, start + row, column, p.linear, p.out, p.out_dtype, no_residual);
      },
      p.linear.n, panels, nullptr, p.linear.panels);
}

int64_t scratch_pooled_projection(const struct fk_pooled_projection* p) {
  return round_up(p->rows_per_task * pooled_row_stride(*p) * 4, 64);
}

void pooled_projection(const struct fk_pooled_projection* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->linear.low_precision) return project_task<bf16>(*p, task, scratch);
#endif
  project_task<float>(*p, task, scratch);
}

}  // namespace
