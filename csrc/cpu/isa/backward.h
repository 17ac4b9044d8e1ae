// What the gradients of several operators share: operands of weight gradients, the backward of a norm, partial sums.
//
// A weight gradient is a sum over rows. Each of a number of partial sums that the shape alone decides belongs to one
// task at a time, which adds its blocks of rows in order; at the end they are added in order. So the bits do not depend
// on the threads. A partial sum lies in panels [ceil(columns / kPanel)][rows][kPanel].
#pragma once

#include "rows.h"

namespace {

// rows[count][width] as panels [width / kPanel][depth][kPanel] (bf16: pairs of rows) of a product over the rows;
// columns past `width` and a last odd row are zero. `depth` says how many rows a panel has room for.
FK_INLINE void panels_of_rows(const float* rows, int64_t stride, int64_t count, int64_t width, int64_t depth,
                              float* panels) {
  for (int64_t n = 0; n < width; n += kPanel)
    for (int64_t i = 0; i < count; ++i)
      copy_row(rows + i * stride + n, min64(kPanel, width - n), kPanel, panels + n * depth + i * kPanel);
}

// Two rows as pairs: to[i][0] from the first, to[i][1] from the second (null: zeros).
FK_INLINE void interleave(const bf16* first, const bf16* second, int64_t n, bf16* to) {
  int64_t i = 0;
#if FK_NATIVE_BF16
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (; i + 2 * FK_VL <= n; i += 2 * FK_VL) {
    const __m512i a = _mm512_loadu_si512(first + i), b = second ? _mm512_loadu_si512(second + i) : (__m512i){};
    _mm512_storeu_si512(to + 2 * i, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 2 * i + 2 * FK_VL, _mm512_permutex2var_epi16(a, high, b));
  }
#endif
  for (; i + FK_VL <= n; i += FK_VL) {
    const vu low = __builtin_convertvector(*(const vh*)(first + i), vu);
    *(vu*)(to + 2 * i) = second ? low | __builtin_convertvector(*(const vh*)(second + i), vu) << 16 : low;
  }
  for (; i < n; ++i) {
    to[2 * i] = first[i];
    to[2 * i + 1] = second ? second[i] : (bf16)0;
  }
}
FK_INLINE void panels_of_rows(const bf16* rows, int64_t stride, int64_t count, int64_t width, int64_t depth,
                              bf16* panels) {
  for (int64_t n = 0; n < width; n += kPanel) {
    const int64_t present = min64(kPanel, width - n);
    for (int64_t i = 0; i < count; i += 2) {
      bf16* to = panels + n * depth + i * kPanel;
      interleave(rows + i * stride + n, i + 1 < count ? rows + (i + 1) * stride + n : nullptr, present, to);
      for (int64_t j = 2 * present; j < 2 * kPanel; ++j) to[j] = 0;
    }
  }
}

// The same rows as the transposed left operand: fp32 is read as it lies, bf16 is paired into `buffer` [rows / 2][width]
// [2]. `stride` becomes that of the operand.
FK_INLINE const float* columns_of_rows(const float* rows, int64_t, int64_t, int64_t*, float*) { return rows; }
FK_INLINE const bf16* columns_of_rows(const bf16* rows, int64_t count, int64_t width, int64_t* stride, bf16* buffer) {
  for (int64_t i = 0; i < count; i += 2)
    interleave(rows + i * *stride, i + 1 < count ? rows + (i + 1) * *stride : nullptr, width, buffer + i * width);
  *stride = 2 * width;
  return buffer;
}

// The part of a weight gradient [all_rows, ...] that a block of `count` rows of two matrices contributes: of its rows
// [0, rows), which `columns` holds, and of its `width` columns, which `panels` holds. `to` is the first panel of them.
template <class A>
FK_INLINE void add_weight_gradient(const A* columns, int64_t stride, int64_t rows, const A* panels, int64_t depth,
                                   int64_t width, int64_t count, float* to, int64_t all_rows, bool accumulate) {
  const Panels<A> w = {panels, depth * kPanel, ceil_div(width, kPanel), round_up(count, kStep<A>), nullptr};
  products<true>(columns, stride, rows, w, to, kPanel, all_rows * kPanel, accumulate, width);
}

FK_INLINE void clear(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0.0f;
}

FK_INLINE void add_values(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + FK_VL <= n; i += FK_VL) store(to + i, load(to + i) + load(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

// Sums over many rows in fp32, in three storeys so that no running sum is long: a few rows, a block of rows, all.
constexpr int64_t kNearRows = 16;
struct RowSums {
  float *near, *block, *total;
  int64_t n;

  // Two of n values are needed; `total` may be null, then nothing is summed.
  FK_INLINE RowSums over(float* scratch, int64_t n, float* total) {
    RowSums s = {scratch, scratch + n, total, n};
    if (total) clear(scratch, 2 * n);
    return s;
  }
  // Behind row i of a block.
  FK_INLINE void next(const RowSums& s, int64_t i, int64_t rows) {
    if (!s.total || ((i + 1) % kNearRows && i + 1 < rows)) return;
    add_values(s.near, s.n, s.block);
    clear(s.near, s.n);
    if (i + 1 < rows) return;
    add_values(s.block, s.n, s.total);
    clear(s.block, s.n);
  }
};

struct BlockRange {
  int64_t first, last;
};
// The blocks of rows that belong to one partial sum.
FK_INLINE BlockRange blocks_of(int64_t rows, int64_t rows_per_block, int64_t partials, int64_t partial) {
  const int64_t blocks = ceil_div(rows, rows_per_block);
  BlockRange range = {blocks * partial / partials, blocks * (partial + 1) / partials};
  return range;
}

// The backward of LayerNorm for one row x, from the gradient of the normalised row: dx, unless null, and contributions
// to the gradients of weight and bias [2][n], unless null. Without a norm dx is the gradient itself.
template <class T, class Out>
FK_INLINE void norm_backward_row(const T* x, const float* grad, int64_t n, const struct fk_norm& norm, Out* dx,
                                 float* affine) {
  if (norm.kind == FK_NO_NORM) {
    if (dx) copy_row(grad, n, n, dx);
    return;
  }
  const RowStatistics s = row_statistics(x, n, norm.eps);
  const vf m = splat(s.mean), r = splat(s.rstd);
  vf along = splat(0.0f), along_row = splat(0.0f);
  int64_t i = 0;
  for (; i + FK_VL <= n; i += FK_VL) {
    const vf g = load(grad + i), y = (load(x + i) - m) * r, weighted = g * load(norm.weight + i);
    along += weighted;
    along_row += weighted * y;
    if (affine) {
      store(affine + i, load(affine + i) + g * y);
      store(affine + n + i, load(affine + n + i) + g);
    }
  }
  float mean = sum(along), slope = sum(along_row);
  for (; i < n; ++i) {
    const float y = (to_float(x[i]) - s.mean) * s.rstd, weighted = grad[i] * norm.weight[i];
    mean += weighted;
    slope += weighted * y;
    if (affine) {
      affine[i] += grad[i] * y;
      affine[n + i] += grad[i];
    }
  }
  if (!dx) return;
  mean /= (float)n;
  slope /= (float)n;
  const vf mv = splat(mean), sv = splat(slope);
  for (i = 0; i + FK_VL <= n; i += FK_VL) {
    const vf y = (load(x + i) - m) * r;
    store(dx + i, (load(grad + i) * load(norm.weight + i) - mv - y * sv) * r);
  }
  for (; i < n; ++i) {
    const float y = (to_float(x[i]) - s.mean) * s.rstd;
    from_float(dx + i, (grad[i] * norm.weight[i] - mean - y * slope) * s.rstd);
  }
}

// Row `row` of x and of dx, which has x's dtype and may be null; without a norm x itself may be absent. The row of
// `own` is added to dx.
template <class T>
FK_INLINE void norm_backward_row(const struct fk_array& x, int64_t row, const float* grad, int64_t n,
                                 const struct fk_norm& norm, T* dx, const struct fk_array& own, float* affine) {
  T* to = dx ? dx + row * n : nullptr;
  norm_backward_row(x.data ? (const T*)x.data + row * n : nullptr, grad, n, norm, to, affine);
  if (to) add_array_row(own, row * n, n, to);
}
FK_INLINE void norm_backward_row(const struct fk_array& x, int64_t row, const float* grad, int64_t n,
                                 const struct fk_norm& norm, void* dx, const struct fk_array& own, float* affine) {
  if (x.dtype == FK_F32)
    norm_backward_row(x, row, grad, n, norm, (float*)dx, own, affine);
  else
    norm_backward_row(x, row, grad, n, norm, (bf16*)dx, own, affine);
}

// Row `row` of an array, converted, zeros up to `padded`; its values are added to `sums`, unless null.
template <class T, class A>
FK_INLINE void copy_summed_row(const T* x, int64_t n, int64_t padded, A* out, float* sums) {
  copy_row(x, n, padded, out);
  if (!sums) return;
  int64_t i = 0;
  for (; i + FK_VL <= n; i += FK_VL) store(sums + i, load(sums + i) + load(x + i));
  for (; i < n; ++i) sums[i] += to_float(x[i]);
}
template <class A>
FK_INLINE void copy_summed_row(const struct fk_array& x, int64_t row, int64_t n, int64_t padded, A* out, float* sums) {
  if (x.dtype == FK_F32)
    copy_summed_row((const float*)x.data + row * n, n, padded, out, sums);
  else
    copy_summed_row((const bf16*)x.data + row * n, n, padded, out, sums);
}

// Adds the partial sums of a row of a panel.
FK_INLINE void add_row(const struct fk_partial_sums& p, int64_t panel, int64_t row, float* total) {
  for (int64_t j = 0; j < kPanel; j += FK_VL) {
    const float* from = p.partials + (panel * p.rows + row) * kPanel + j;
    vf sums = splat(0.0f);
    for (int64_t i = 0; i < p.count; ++i) sums += load(from + i * p.stride);
    store(total + j, sums);
  }
}

// A panel's worth of a gradient with taps whose panels each belong to one tap: these channels of all taps, of a share
// of the rows, because a channel's taps lie side by side.
constexpr int64_t kAddedTaps = 64;
template <class Out>
FK_INLINE void add_taps(const struct fk_partial_sums& p, int64_t panel, Out* out) {
  const int64_t groups = p.columns / p.taps / kPanel, group = panel % groups, share = panel / groups;
  float totals[kAddedTaps * kPanel] __attribute__((aligned(64))), values[kAddedTaps * kPanel];
  for (int64_t row = p.rows * share / p.taps; row < p.rows * (share + 1) / p.taps; ++row) {
    for (int64_t tap = 0; tap < p.taps; ++tap) add_row(p, tap * groups + group, row, totals + tap * kPanel);
    transpose((const uint32_t*)totals, kPanel, p.taps, kPanel, (uint32_t*)values, p.taps, p.taps);
    const int64_t n = kPanel * p.taps;
    copy_row(values, n, n, out + row * p.columns + group * n);
  }
}

template <class Out>
FK_INLINE void add_panel(const struct fk_partial_sums& p, int64_t panel, Out* out) {
  const int64_t column = panel * kPanel, width = min64(kPanel, p.columns - column);
  const int64_t channels = p.columns / p.taps;
  if (p.taps > 1 && p.taps <= kAddedTaps && channels % kPanel == 0) return add_taps(p, panel, out);
  for (int64_t row = 0; row < p.rows; ++row) {
    float total[kPanel] __attribute__((aligned(64)));
    add_row(p, panel, row, total);
    if (p.transposed) {
      for (int64_t j = 0; j < width; ++j) from_float(out + (column + j) * p.rows + row, total[j]);
      continue;
    }
    Out* to = out + row * p.columns;
    if (p.taps == 1)
      copy_row(total, width, width, to + column);
    else
      for (int64_t j = 0; j < width; ++j)
        from_float(to + (column + j) % channels * p.taps + (column + j) / channels, total[j]);
  }
}

void add_partials(const struct fk_partial_sums* p, int64_t panel) {
  if (p->out_dtype == FK_F32)
    add_panel(*p, panel, (float*)p->out);
  else
    add_panel(*p, panel, (bf16*)p->out);
}

// A vector of a row, added over the partial sums.
FK_INLINE vf weight_sum(const struct fk_weight_sums& p, int64_t row, int64_t column) {
  const float* from = p.partials + row * p.columns + column;
  vf sums = load(from);
  for (int64_t i = 1; i < p.count; ++i) sums += load(from + i * p.stride);
  return p.scale ? sums * load(p.scale + column) : sums;
}

template <class Out>
FK_INLINE void add_weight_task(const struct fk_weight_sums& p, int64_t task, Out* out) {
  constexpr int64_t kSide = FK_WEIGHT_TASK;
  const int64_t first = task * kSide;
  if (!p.turned) {
    for (int64_t row = first; row < min64(p.rows, first + kSide); ++row)
      for (int64_t c = 0; c < p.width; c += FK_VL) {
        Out* to = out + row * p.out_stride + c;
        const vf sums = weight_sum(p, row, c);
        c + FK_VL <= p.width ? store(to, sums) : store_tail(to, sums, p.width - c);
      }
    return;
  }
  float square[kSide * kSide] __attribute__((aligned(64))), turned[kSide * kSide] __attribute__((aligned(64)));
  for (int64_t at = 0; at < p.rows; at += kSide) {
    const int64_t rows = min64(kSide, p.rows - at);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < min64(kSide, p.columns - first); c += FK_VL)
        store(square + row * kSide + c, weight_sum(p, at + row, first + c));
    transpose((const uint32_t*)square, kSide, rows, kSide, (uint32_t*)turned, kSide, kSide);
    for (int64_t c = 0; c < min64(kSide, p.width - first); ++c)
      copy_row(turned + c * kSide, rows, rows, out + (first + c) * p.out_stride + at);
  }
}

void add_weight_sums(const struct fk_weight_sums* p, int64_t task) {
  if (p->out_dtype == FK_F32)
    add_weight_task(*p, task, (float*)p->out);
  else
    add_weight_task(*p, task, (bf16*)p->out);
}

}  // namespace
