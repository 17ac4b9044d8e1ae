// Gradients of the patch embedding in two steps.
//
// First, for each block of output pixels: the neighbourhoods are gathered as in the forward, the gradients go back
// through the LayerNorm behind the convolution, and both together are the weight's gradient. Then every pixel of the
// map collects from the output pixels it took part in. Those of one stride's residue class take the same taps: their
// rows are products of the gradients as they lie in memory, with a border of zeros around the map, and the transposed
// weight.
#pragma once

#include "backward.h"
#include "patch_embedding.h"

namespace {

template <class A>
struct EmbeddingBackwardScratch {
  A* rows;           // [rows][lda] neighbourhoods
  A* panels;         // the same in panels [K][depth]
  float* out;        // [rows][ldo] the convolution's results, when a LayerNorm follows
  A* slopes;         // [rows][lds] their gradients
  A* slope_columns;  // bf16: the same paired along the rows
  float* grad;       // one row of the output's gradient
  float* slope;      // the same behind the LayerNorm
  float* sums;       // for sums over rows
  int64_t lda, ldo, lds, depth, bytes;

  FK_INLINE EmbeddingBackwardScratch layout(const struct fk_patch_embedding_backward& p, void* base) {
    const int64_t size = (int64_t)sizeof(A), n = p.forward.linear.n, k = p.forward.linear.k;
    EmbeddingBackwardScratch s;
    s.depth = round_up(p.rows_per_block, 2);
    s.lda = round_up(k, 2) + kRowPad;
    s.ldo = round_up(n, kPanel) + kRowPad;
    s.lds = round_up(n, 2) + kRowPad;
    char* at = (char*)base;
    s.rows = (A*)at;
    at += round_up(s.depth * s.lda * size, 64);
    s.panels = (A*)at;
    at += s.depth * round_up(k, kPanel) * size;
    s.out = (float*)at;
    at += s.depth * s.ldo * 4;
    s.slopes = (A*)at;
    at += round_up(s.depth * s.lds * size, 64);
    s.slope_columns = (A*)at;
    at += size == 2 ? round_up(s.depth * n * size, 64) : 0;
    s.grad = (float*)at;
    at += s.ldo * 4;
    s.slope = (float*)at;
    at += s.ldo * 4;
    s.sums = (float*)at;
    at += round_up(6 * n * 4, 64);
    s.bytes = at - (char*)base;
    return s;
  }
};

// Where the gradient of output pixel (y, x) of an image lies in `p.slopes`.
FK_INLINE int64_t slope_offset(const struct fk_patch_embedding_backward& p, int64_t image, int64_t y, int64_t x) {
  return ((image * p.slope_h + y + p.border_top) * p.slope_w + x + p.border_left) * p.slope_stride;
}

template <class A>
FK_INLINE void embedding_backward_block(const struct fk_patch_embedding_backward& p, int64_t partial, int64_t first,
                                        int64_t rows, bool accumulate, const EmbeddingBackwardScratch<A>& s) {
  const struct fk_patch_embedding& f = p.forward;
  const int64_t n = f.linear.n, k = f.linear.k, panels = ceil_div(k, kPanel), image_rows = f.out_h * f.out_w;
  const bool normed = f.norm.kind != FK_NO_NORM;
  for (int64_t i = 0; i < rows && (p.weight || normed); ++i)
    if (f.x.dtype == FK_F32)
      gather_neighbourhood<float>(f, first + i, s.rows + i * s.lda, round_up(k, 2));
    else
      gather_neighbourhood<bf16>(f, first + i, s.rows + i * s.lda, round_up(k, 2));
  if (normed)
    product(s.rows, s.lda, rows, f.linear, 0, ceil_div(n, kPanel),
            [&](int64_t row, int64_t height, int64_t column, const float* tile) {
              for (int64_t i = 0; i < height; ++i)
                for (int64_t j = 0; j < kPanel; j += FK_VL)
                  store(s.out + (row + i) * s.ldo + column + j,
                        load(tile + i * kPanel + j) + load(f.linear.bias + column + j));
            });
  const RowSums affine =
      RowSums::over(s.sums, 2 * n, p.affine ? p.affine + partial * round_up(2 * n, kPanel) : nullptr);
  const RowSums bias = RowSums::over(s.sums + 4 * n, n, p.bias ? p.bias + partial * round_up(n, kPanel) : nullptr);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t pixel = first + i;
    if (p.grad.dtype == FK_F32)
      copy_row((const float*)p.grad.data + pixel * n, n, n, s.grad);
    else
      copy_row((const bf16*)p.grad.data + pixel * n, n, n, s.grad);
    norm_backward_row(s.out + i * s.ldo, s.grad, n, f.norm, s.slope, p.affine ? affine.near : nullptr);
    copy_summed_row(s.slope, n, round_up(n, 2), s.slopes + i * s.lds, p.bias ? bias.near : nullptr);
    RowSums::next(affine, i, rows);
    RowSums::next(bias, i, rows);
    if (p.slopes)
      copy_row(s.slopes + i * s.lds, n, p.slope_stride,
               (A*)p.slopes +
                   slope_offset(p, pixel / image_rows, pixel % image_rows / f.out_w, pixel % image_rows % f.out_w));
  }
  if (!p.weight) return;
  panels_of_rows(s.rows, s.lda, rows, k, s.depth, s.panels);
  int64_t stride = s.lds;
  const A* columns = columns_of_rows(s.slopes, rows, n, &stride, s.slope_columns);
  add_weight_gradient(columns, stride, n, s.panels, s.depth, k, rows, p.weight + partial * panels * n * kPanel, n,
                      accumulate);
}

template <class A>
FK_INLINE void embedding_backward_task(const struct fk_patch_embedding_backward& p, int64_t partial, void* scratch) {
  const EmbeddingBackwardScratch<A> s = EmbeddingBackwardScratch<A>::layout(p, scratch);
  const struct fk_patch_embedding& f = p.forward;
  const int64_t all = f.batch * f.out_h * f.out_w, n = f.linear.n;
  const BlockRange range = blocks_of(all, p.rows_per_block, p.partials, partial);
  if (p.affine) clear(p.affine + partial * round_up(2 * n, kPanel), round_up(2 * n, kPanel));
  if (p.bias) clear(p.bias + partial * round_up(n, kPanel), round_up(n, kPanel));
  for (int64_t b = range.first; b < range.last; ++b) {
    const int64_t first = b * p.rows_per_block;
    embedding_backward_block(p, partial, first, min64(p.rows_per_block, all - first), b > range.first, s);
  }
}

// The first number from `from` on that leaves this remainder.
FK_INLINE int64_t next_of_class(int64_t from, int64_t remainder, int64_t modulus) {
  const int64_t ahead = (remainder - from) % modulus;
  return from + (ahead < 0 ? ahead + modulus : ahead);
}

// A band of the map's rows. Pixel (y, x) took part, by tap (ky, kx), in output pixel ((y + padding - ky) / stride,
// ...).
// What a tap adds to the gradient of a band's pixels: of every `stride`th row and column from the first ones on that it
// reaches. The slopes of all these rows are one operand, with those between them that none of the columns asks for.
template <class A>
FK_INLINE void add_tap(const struct fk_patch_embedding_backward& p, int64_t image, int64_t top, int64_t bottom,
                       int64_t ky, int64_t kx, float* band, int64_t ldc) {
  const struct fk_patch_embedding& f = p.forward;
  const int64_t step = f.stride, panels = ldc / kPanel;
  const int64_t first_y = next_of_class(top, ky % step - f.padding % step, step);
  const int64_t first_x = next_of_class(0, kx % step - f.padding % step, step);
  if (first_y >= bottom || first_x >= f.width) return;
  const int64_t lines = ceil_div(bottom - first_y, step), columns = ceil_div(f.width - first_x, step);
  const A* slopes =
      (const A*)p.slopes + slope_offset(p, image, (first_y + f.padding - ky) / step, (first_x + f.padding - kx) / step);
  float* const first = band + ((first_y - top) * f.width + first_x) * ldc;
  product(
      slopes, p.slope_stride, (lines - 1) * p.slope_w + columns, panels_of<A>(p.taps[ky * f.kernel + kx], 0, panels), 0,
      [&](int64_t row, int64_t height, int64_t column, const float* tile) {
        int64_t y = row / p.slope_w, x = row % p.slope_w;
        for (int64_t i = 0; i < height; ++i) {
          if (x < columns) add_values(tile + i * kPanel, kPanel, first + (y * f.width + x) * step * ldc + column);
          if (++x < p.slope_w) continue;
          x = 0;
          ++y;
        }
      },
      INT64_MAX, panels, nullptr);
}

template <class A>
FK_INLINE void embedding_input_task(const struct fk_patch_embedding_backward& p, int64_t task, void* scratch) {
  const struct fk_patch_embedding& f = p.forward;
  const int64_t image = task / p.bands, top = task % p.bands * p.rows_per_band;
  const int64_t bottom = min64(top + p.rows_per_band, f.height), n = f.channels;
  const int64_t panels = ceil_div(n, kPanel), ldc = panels * kPanel;
  float* band = (float*)scratch;
  float* sums = band + p.rows_per_band * f.width * ldc;
  const int64_t pixels = (bottom - top) * f.width, start = (image * f.height + top) * f.width;
  if (f.kernel == 1 && f.stride == 1 && f.padding == 0) {  // a linear layer
    products((const A*)p.slopes + slope_offset(p, image, top, 0), p.slope_stride, pixels,
             panels_of<A>(p.taps[0], 0, panels), band, ldc, kPanel, false);
  } else {
    clear(band, pixels * ldc);
    for (int64_t ky = 0; ky < f.kernel; ++ky)
      for (int64_t kx = 0; kx < f.kernel; ++kx) add_tap<A>(p, image, top, bottom, ky, kx, band, ldc);
  }
  float* total = p.in_affine ? p.in_affine + task * round_up(2 * n, kPanel) : nullptr;
  if (total) clear(total, round_up(2 * n, kPanel));
  const RowSums affine = RowSums::over(sums, 2 * n, total);
  for (int64_t i = 0; i < pixels; ++i) {
    norm_backward_row(f.x, start + i, band + i * ldc, n, f.in_norm, p.dx, fk_array{}, total ? affine.near : nullptr);
    RowSums::next(affine, i, pixels);
  }
}

int64_t scratch_patch_embedding_backward(const struct fk_patch_embedding_backward* p) {
  const int64_t wide = EmbeddingBackwardScratch<float>::layout(*p, nullptr).bytes;
  return max64(wide, EmbeddingBackwardScratch<bf16>::layout(*p, nullptr).bytes);
}

void patch_embedding_backward(const struct fk_patch_embedding_backward* p, int64_t partial, void* scratch) {
#if FK_NATIVE_BF16
  if (p->low_precision) return embedding_backward_task<bf16>(*p, partial, scratch);
#endif
  embedding_backward_task<float>(*p, partial, scratch);
}

int64_t scratch_patch_embedding_input(const struct fk_patch_embedding_backward* p) {
  const int64_t n = p->forward.channels;
  return (p->rows_per_band * p->forward.width * round_up(n, kPanel) + 4 * n) * 4;
}

void patch_embedding_input(const struct fk_patch_embedding_backward* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->low_precision) return embedding_input_task<bf16>(*p, task, scratch);
#endif
  embedding_input_task<float>(*p, task, scratch);
}

}  // namespace
