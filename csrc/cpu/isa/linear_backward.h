// Gradients of LayerNorm and linear for blocks of rows; either step may be absent.
#pragma once

#include "backward.h"

namespace {

template <class A>
struct LinearBackwardScratch {
  A* rows;          // [rows][lda] what the linear read
  A* panels;        // the same in panels [k][depth]
  A* grad;          // [rows][ldg]
  A* grad_columns;  // bf16: the same paired along the rows
  float* inputs;    // [rows][ldi] gradients of what the linear read
  float* sums;      // for sums over rows
  int64_t lda, ldg, ldi, depth, bytes;

  FK_INLINE LinearBackwardScratch layout(const struct fk_linear_backward& p, void* base) {
    const int64_t size = (int64_t)sizeof(A);
    LinearBackwardScratch s;
    s.depth = round_up(p.rows_per_block, 2);
    s.lda = round_up(p.k, 2) + kRowPad;
    s.ldg = round_up(p.n, 2) + kRowPad;
    s.ldi = round_up(p.k, kPanel) + kRowPad;
    char* at = (char*)base;
    s.rows = (A*)at;
    at += round_up(s.depth * s.lda * size, 64);
    s.panels = (A*)at;
    at += s.depth * round_up(p.k, kPanel) * size;
    s.grad = (A*)at;
    at += round_up(s.depth * s.ldg * size, 64);
    s.grad_columns = (A*)at;
    at += size == 2 ? round_up(s.depth * p.n * size, 64) : 0;
    s.inputs = (float*)at;
    at += s.depth * s.ldi * 4;
    s.sums = (float*)at;
    at += round_up((4 * p.k + 2 * p.n) * 4, 64);
    s.bytes = at - (char*)base;
    return s;
  }
};

template <class A>
FK_INLINE void linear_backward_block(const struct fk_linear_backward& p, int64_t partial, int64_t first, int64_t rows,
                                     bool accumulate, const LinearBackwardScratch<A>& s) {
  const int64_t panels = ceil_div(p.k, kPanel);
  const RowSums bias = RowSums::over(s.sums, p.n, p.bias ? p.bias + partial * round_up(p.n, kPanel) : nullptr);
  for (int64_t i = 0; i < rows; ++i) {
    copy_summed_row(p.grad, first + i, p.n, round_up(p.n, 2), s.grad + i * s.ldg, p.bias ? bias.near : nullptr);
    RowSums::next(bias, i, rows);
  }
  if (p.weight) {
    for (int64_t i = 0; i < rows; ++i) normalize_row(p.x, first + i, p.k, round_up(p.k, 2), p.norm, s.rows + i * s.lda);
    panels_of_rows(s.rows, s.lda, rows, p.k, s.depth, s.panels);
    int64_t stride = s.ldg;
    const A* columns = columns_of_rows(s.grad, rows, p.n, &stride, s.grad_columns);
    add_weight_gradient(columns, stride, p.n, s.panels, s.depth, p.k, rows, p.weight + partial * panels * p.n * kPanel,
                        p.n, accumulate);
  }
  if (!p.dx && !p.affine && !p.inputs) return;
  if (p.to_input.panels)
    product(
        s.grad, s.ldg, rows, p.to_input, 0, panels,
        [&](int64_t row, int64_t height, int64_t column, const float* tile) {
          for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < kPanel; j += FK_VL)
              store(s.inputs + (row + i) * s.ldi + column + j, load(tile + i * kPanel + j));
        },
        p.k);
  else
    for (int64_t i = 0; i < rows; ++i) copy_row(s.grad + i * s.ldg, p.k, p.k, s.inputs + i * s.ldi);
  if (p.inputs) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (first + i) * p.k;
      const float* from = s.inputs + i * s.ldi;
      if (!p.added.data)
        copy_row(from, p.k, p.k, p.inputs + at);
      else if (p.added.dtype == FK_F32)
        add_rows_into(from, (const float*)p.added.data + at, p.k, p.inputs + at);
      else
        add_rows_into(from, (const bf16*)p.added.data + at, p.k, p.inputs + at);
    }
    return;
  }
  const RowSums affine =
      RowSums::over(s.sums, 2 * p.k, p.affine ? p.affine + partial * round_up(2 * p.k, kPanel) : nullptr);
  for (int64_t i = 0; i < rows; ++i) {
    norm_backward_row(p.x, first + i, s.inputs + i * s.ldi, p.k, p.norm, p.dx, p.own, p.affine ? affine.near : nullptr);
    RowSums::next(affine, i, rows);
  }
}

template <class A>
FK_INLINE void linear_backward_task(const struct fk_linear_backward& p, int64_t partial, void* scratch) {
  const LinearBackwardScratch<A> s = LinearBackwardScratch<A>::layout(p, scratch);
  const BlockRange range = blocks_of(p.rows, p.rows_per_block, p.partials, partial);
  if (p.affine) clear(p.affine + partial * round_up(2 * p.k, kPanel), round_up(2 * p.k, kPanel));
  if (p.bias) clear(p.bias + partial * round_up(p.n, kPanel), round_up(p.n, kPanel));
  for (int64_t b = range.first; b < range.last; ++b) {
    const int64_t first = b * p.rows_per_block;
    linear_backward_block(p, partial, first, min64(p.rows_per_block, p.rows - first), b > range.first, s);
  }
}

int64_t scratch_linear_backward(const struct fk_linear_backward* p) {
  const int64_t wide = LinearBackwardScratch<float>::layout(*p, nullptr).bytes;
  return max64(wide, LinearBackwardScratch<bf16>::layout(*p, nullptr).bytes);
}

void linear_backward(const struct fk_linear_backward* p, int64_t partial, void* scratch) {
#if FK_NATIVE_BF16
  if (p->low_precision) return linear_backward_task<bf16>(*p, partial, scratch);
#endif
  linear_backward_task<float>(*p, partial, scratch);
}

// What the linear makes of a block of rows, in the products' type: the forward again.
template <class A>
FK_INLINE void linear_forward_task(const struct fk_linear_forward& p, int64_t task, void* scratch) {
  const int64_t first = task * p.rows_per_task, rows = min64(p.rows_per_task, p.rows - first);
  const int64_t lda = round_up(p.k, 2) + kRowPad;
  A* normed = (A*)scratch;
  A* out = (A*)p.out + first * p.n;
  for (int64_t i = 0; i < rows; ++i)
    any_norm_row(p.x, (first + i) * p.k, p.k, round_up(p.k, 2), p.norm, (first + i) / p.rows_per_image,
                 normed + i * lda);
  if (!p.linear.panels) {
    for (int64_t i = 0; i < rows; ++i) copy_row(normed + i * lda, p.k, p.k, out + i * p.n);
    return;
  }
  const struct fk_array none = {nullptr, FK_F32, 0};
  product(
      normed, lda, rows, p.linear, 0, ceil_div(p.n, kPanel),
      [&](int64_t row, int64_t height, int64_t column, const float* tile) {
        write_tile(tile, kPanel, height, row, column, p.linear, out, none);
      },
      p.n);
}

int64_t scratch_linear_forward(const struct fk_linear_forward* p) {
  return p->rows_per_task * (round_up(p->k, 2) + kRowPad) * 4;
}

void linear_forward(const struct fk_linear_forward* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->low_precision) return linear_forward_task<bf16>(*p, task, scratch);
#endif
  linear_forward_task<float>(*p, task, scratch);
}

}  // namespace
