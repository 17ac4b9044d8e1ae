// Gradients of LayerNorm, linear, activation, linear: for each block of rows the hidden values and their gradients are
// made chunk by chunk, used for both weights and the rows' own gradient while they are in the cache, and forgotten.
#pragma once

#include "activations.h"
#include "backward.h"

namespace {

template <class A>
struct MlpBackwardScratch {
  A* normed;         // [rows][lda]
  A* normed_panels;  // panels [channels][depth]
  A* grad;           // [rows][ldg]
  A* grad_columns;   // bf16: the same paired along the rows
  float* hidden;     // panels [chunk][depth] of a chunk's hidden values, then of what the activation makes of them
  A* activated;      // bf16: the latter, paired along the rows
  A* slopes;         // [rows][ldh] gradients of the hidden values
  A* slope_columns;  // bf16: the same paired along the rows
  float* inputs;     // [rows][ldi] gradients of the normalised rows
  float* sums;       // for sums over rows
  char *ready, *grad_ready;  // normed and grad for products with every chunk's weights; bf16 is read where it lies
  int64_t lda, ldg, ldh, ldi, depth, bytes;

  FK_INLINE MlpBackwardScratch layout(const struct fk_pointwise_mlp_backward& p, void* base) {
    constexpr bool kLow = sizeof(A) == 2;
    const int64_t size = (int64_t)sizeof(A), chunk = p.chunk_panels * kPanel;
    MlpBackwardScratch s;
    s.depth = round_up(p.rows_per_block, 2);
    s.lda = round_up(p.channels, kPanel) + kRowPad;
    s.ldg = round_up(p.out, kPanel) + kRowPad;
    s.ldh = chunk + kRowPad;
    s.ldi = round_up(p.channels, kPanel) + kRowPad;
    char* at = (char*)base;
    s.normed = (A*)at;
    at += round_up(s.depth * s.lda * size, 64);
    s.normed_panels = (A*)at;
    at += s.depth * round_up(p.channels, kPanel) * size;
    s.grad = (A*)at;
    at += round_up(s.depth * s.ldg * size, 64);
    s.grad_columns = (A*)at;
    at += kLow ? round_up(s.depth * p.out * size, 64) : 0;
    s.hidden = (float*)at;
    at += s.depth * chunk * 4;
    s.activated = (A*)at;
    at += kLow ? s.depth * chunk * size : 0;
    s.slopes = (A*)at;
    at += round_up(s.depth * s.ldh * size, 64);
    s.slope_columns = (A*)at;
    at += kLow ? s.depth * chunk * size : 0;
    s.inputs = (float*)at;
    at += s.depth * s.ldi * 4;
    s.sums = (float*)at;
    at += round_up((4 * p.channels + 2 * p.out + chunk) * 4, 64);
    s.ready = at;
    at += kLow ? 0 : prepared_bytes<A>(s.depth, p.channels);
    s.grad_ready = at;
    at += kLow ? 0 : prepared_bytes<A>(s.depth, p.out);
    s.bytes = at - (char*)base;
    return s;
  }
};

// The activated panels as operand of the second weight's gradient.
FK_INLINE const float* activated_panels(const float* hidden, int64_t, int64_t, int64_t, float*) { return hidden; }
#if FK_NATIVE_BF16
FK_INLINE const bf16* activated_panels(const float* hidden, int64_t rows, int64_t depth, int64_t panels, bf16* to) {
  for (int64_t n = 0; n < panels; ++n)
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < kPanel; j += FK_VL) {
        const float* from = hidden + (n * depth + i) * kPanel + j;
        const vf second = i + 1 < rows ? load(from + kPanel) : splat(0.0f);
        *(vu*)(to + (n * depth + i) * kPanel + 2 * j) = pair_bf16(load(from), second);
      }
  return to;
}
#endif

// A tile of gradients behind the activation meets the hidden values, which it replaces by the activated ones. Returns
// their gradients in `slopes` and, unless `sums` is null, adds them up there.
template <class A, fk_activation Activation>
FK_INLINE void activation_backward(const float* tile, int64_t rows, float* hidden, A* slopes, int64_t ldh,
                                   float* sums) {
  constexpr bool kLow = sizeof(A) == 2;
  for (int64_t j = 0; j < kPanel; j += FK_VL) {
    vf total = splat(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      vf slope;
      float* at = hidden + i * kPanel + j;
      store(at, activate<kLow, Activation>(load(at), &slope));
      slope *= load(tile + i * kPanel + j);
      store(slopes + i * ldh + j, slope);
      total += slope;
    }
    if (sums) store(sums + j, load(sums + j) + total);
  }
}

template <class A, fk_activation Activation>
static __attribute__((noinline)) void mlp_backward_block(const struct fk_pointwise_mlp_backward& p, int64_t partial,
                                                         int64_t slice, int64_t first, int64_t rows, bool accumulate,
                                                         const MlpBackwardScratch<A>& s) {
  const int64_t hidden_panels = ceil_div(p.hidden, kPanel), input_panels = ceil_div(p.channels, kPanel);
  const int64_t input_width = input_panels * kPanel, hidden_width = hidden_panels * kPanel;
  const bool wants_slopes = p.wants_input || p.weight1 || p.bias1;
  for (int64_t i = 0; i < rows; ++i)
    normalize_row(p.x, first + i, p.channels, round_up(p.channels, 2), p.norm, s.normed + i * s.lda);
  if (p.weight1) panels_of_rows(s.normed, s.lda, rows, p.channels, s.depth, s.normed_panels);
  const RowSums of_grad =
      RowSums::over(s.sums, p.out, p.bias2 && slice == 0 ? p.bias2 + partial * round_up(p.out, kPanel) : nullptr);
  for (int64_t i = 0; i < rows; ++i) {
    copy_summed_row(p.grad, first + i, p.out, round_up(p.out, 2), s.grad + i * s.ldg,
                    of_grad.total ? of_grad.near : nullptr);
    RowSums::next(of_grad, i, rows);
  }
  int64_t grad_stride = s.ldg;
  const A* grad_columns = p.weight2 ? columns_of_rows(s.grad, rows, p.out, &grad_stride, s.grad_columns) : nullptr;
  float* block_sums = s.sums + 2 * p.out;

  const int64_t begin = slice * p.slice_panels, end = min64(begin + p.slice_panels, hidden_panels);
  const char *ready = nullptr, *grad_ready = nullptr;
  if (sizeof(A) == 4 && end - begin > p.chunk_panels) {
    ready = prepare(s.normed, s.lda, rows, p.channels, p.chunk_panels, s.ready);
    if (wants_slopes) grad_ready = prepare(s.grad, s.ldg, rows, p.out, p.chunk_panels, s.grad_ready);
  }
  for (int64_t h = begin; h < end; h += p.chunk_panels) {
    const int64_t h_end = min64(h + p.chunk_panels, end), panels = h_end - h, column = h * kPanel;
    const int64_t width = min64(h_end * kPanel, p.hidden) - column;
    const auto hidden_at = [&](int64_t row, int64_t c) { return s.hidden + (c - column) * s.depth + row * kPanel; };
    Panels<A> expand = panels_of<A>(p.expand, h, h_end), to_hidden = panels_of<A>(p.to_hidden, h, h_end);
    Panels<A> to_input = panels_of<A>(p.to_input, 0, input_panels, column, panels * kPanel);
    expand.after = to_hidden.first;
    to_hidden.after = to_input.first;
    to_input.after = (const A*)p.expand.panels;
    product(
        s.normed, s.lda, rows, expand, column,
        [&](int64_t row, int64_t height, int64_t c, const float* tile) {
          float* to = hidden_at(row, c);
          for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < kPanel; j += FK_VL)
              store(to + i * kPanel + j, load(tile + i * kPanel + j) + load(p.expand.bias + c + j));
        },
        INT64_MAX, panels, ready);
    if (wants_slopes) {
      if (p.bias1) clear(block_sums, panels * kPanel);
      product(
          s.grad, s.ldg, rows, to_hidden, column,
          [&](int64_t row, int64_t height, int64_t c, const float* tile) {
            activation_backward<A, Activation>(tile, height, hidden_at(row, c), s.slopes + row * s.ldh + c - column,
                                               s.ldh, p.bias1 ? block_sums + c - column : nullptr);
          },
          INT64_MAX, panels, grad_ready);
      if (p.bias1) add_values(block_sums, panels * kPanel, p.bias1 + partial * hidden_width + column);
    } else {
      for (int64_t n = 0; n < panels; ++n)
        for (int64_t i = 0; i < rows * kPanel; i += FK_VL) {
          float* at = s.hidden + n * s.depth * kPanel + i;
          store(at, activate<sizeof(A) == 2, Activation>(load(at)));
        }
    }
    if (p.weight2)
      add_weight_gradient(grad_columns, grad_stride, p.out,
                          activated_panels(s.hidden, rows, s.depth, panels, s.activated), s.depth, width, rows,
                          p.weight2 + (partial * hidden_panels + h) * p.out * kPanel, p.out, accumulate);
    if (p.weight1) {
      int64_t stride = s.ldh;
      const A* columns = columns_of_rows(s.slopes, rows, panels * kPanel, &stride, s.slope_columns);
      add_weight_gradient(columns, stride, width, s.normed_panels, s.depth, p.channels, rows,
                          p.weight1 + (partial * input_width * p.hidden + column * kPanel), p.hidden, accumulate);
    }
    if (p.wants_input) products(s.slopes, s.ldh, rows, to_input, s.inputs, s.ldi, kPanel, h > begin);
  }
}

// dx and the norm's own gradients of a block of rows, from the gradients of the normalised rows.
FK_INLINE void mlp_backward_input(const struct fk_pointwise_mlp_backward& p, int64_t partial, int64_t first,
                                  int64_t rows, const float* inputs, int64_t stride, float* scratch) {
  const int64_t n = p.channels;
  const RowSums affine =
      RowSums::over(scratch, 2 * n, p.affine ? p.affine + partial * round_up(2 * n, kPanel) : nullptr);
  for (int64_t i = 0; i < rows; ++i) {
    norm_backward_row(p.x, first + i, inputs + i * stride, n, p.norm, p.dx, p.own, p.affine ? affine.near : nullptr);
    RowSums::next(affine, i, rows);
  }
}

template <class A>
FK_INLINE void mlp_backward_task(const struct fk_pointwise_mlp_backward& p, int64_t task, void* scratch) {
  const MlpBackwardScratch<A> s = MlpBackwardScratch<A>::layout(p, scratch);
  const int64_t partial = task / p.slices, slice = task % p.slices;
  const int64_t hidden_panels = ceil_div(p.hidden, kPanel);
  const BlockRange range = blocks_of(p.rows, p.rows_per_block, p.partials, partial);
  const int64_t begin = slice * p.slice_panels, end = min64(begin + p.slice_panels, hidden_panels);
  if (p.bias1) clear(p.bias1 + (partial * hidden_panels + begin) * kPanel, (end - begin) * kPanel);
  if (slice == 0) {
    if (p.bias2) clear(p.bias2 + partial * round_up(p.out, kPanel), round_up(p.out, kPanel));
    if (p.affine) clear(p.affine + partial * round_up(2 * p.channels, kPanel), round_up(2 * p.channels, kPanel));
  }
  for (int64_t b = range.first; b < range.last; ++b) {
    const int64_t first = b * p.rows_per_block, rows = min64(p.rows_per_block, p.rows - first);
    with_activation(p.activation, [&](auto activation) {
      mlp_backward_block<A, activation.value>(p, partial, slice, first, rows, b > range.first, s);
    });
    if (!p.wants_input) continue;
    if (p.inputs)
      for (int64_t i = 0; i < rows; ++i)
        copy_row(s.inputs + i * s.ldi, p.channels, p.channels, p.inputs + (slice * p.rows + first + i) * p.channels);
    else
      mlp_backward_input(p, partial, first, rows, s.inputs, s.ldi, s.sums);
  }
}

int64_t scratch_pointwise_mlp_backward(const struct fk_pointwise_mlp_backward* p) {
  const int64_t wide = MlpBackwardScratch<float>::layout(*p, nullptr).bytes;
  return max64(wide, MlpBackwardScratch<bf16>::layout(*p, nullptr).bytes);
}

void pointwise_mlp_backward(const struct fk_pointwise_mlp_backward* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->expand.low_precision) return mlp_backward_task<bf16>(*p, task, scratch);
#endif
  mlp_backward_task<float>(*p, task, scratch);
}

// Behind all slices: adds what they found for the rows of one partial sum.
void pointwise_mlp_backward_input(const struct fk_pointwise_mlp_backward* p, int64_t partial, void* scratch) {
  const MlpBackwardScratch<float> s = MlpBackwardScratch<float>::layout(*p, scratch);
  const BlockRange range = blocks_of(p->rows, p->rows_per_block, p->partials, partial);
  for (int64_t b = range.first; b < range.last; ++b) {
    const int64_t first = b * p->rows_per_block, rows = min64(p->rows_per_block, p->rows - first);
    const int64_t n = rows * p->channels;
    float* total = p->inputs + first * p->channels;
    for (int64_t slice = 1; slice < p->slices; ++slice) add_values(total + slice * p->rows * p->channels, n, total);
    mlp_backward_input(*p, partial, first, rows, total, p->channels, s.sums);
  }
}

}  // namespace
