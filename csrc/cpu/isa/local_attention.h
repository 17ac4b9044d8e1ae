// Attention inside windows of g x g pixels, for some windows of one image: the rows are gathered from the map
// (normalised and projected, if wanted), attended window by window, and written back where they came from.
#pragma once

#include "attention.h"

namespace {

template <class A>
struct LocalScratch {
  AttentionScratch<A> attention;
  int64_t* pixels;  // of each row, -1 for padding
  float* mask;      // [g * g] of one window
  A* normed;        // [rows][ldn] what the projection to q, k and v reads
  A* qkv;           // [rows][ldq]
  A* rows;          // [rows][lda] heads side by side
  int64_t ldn, ldq, lda, bytes;

  FK_INLINE AttentionShape shape(const struct fk_local_attention& p) {
    AttentionShape shape = {
        p.window * p.window, p.channels / p.heads, p.value_channels / p.heads, p.scale, p.bias_stride, nullptr};
    return shape;
  }

  FK_INLINE LocalScratch layout(const struct fk_local_attention& p, void* base) {
    LocalScratch s;
    const int64_t rows = p.windows_per_task * p.window * p.window, size = (int64_t)sizeof(A);
    char* at = (char*)base;
    s.attention = AttentionScratch<A>::layout(shape(p), &at);
    s.ldn = round_up(p.in_channels, 2) + kRowPad;
    s.ldq = round_up(2 * p.channels + p.value_channels, kPanel) + kRowPad;
    s.lda = round_up(p.value_channels, 2) + kRowPad;
    s.pixels = (int64_t*)at;
    at += round_up(rows * 8, 64);
    s.mask = (float*)at;
    at += round_up(p.window * p.window * 4, 64);
    s.normed = (A*)at;
    at += p.qkv.panels ? round_up(rows * s.ldn * size, 64) : 0;
    s.qkv = (A*)at;
    at += round_up(rows * s.ldq * size, 64);
    s.rows = (A*)at;
    at += round_up(rows * s.lda * size, 64);
    s.bytes = at - (char*)base;
    return s;
  }
};

// The pixel of every row of the windows [first, first + windows).
FK_INLINE void find_pixels(const struct fk_local_attention& p, int64_t first, int64_t windows, int64_t* pixels) {
  const int64_t across = ceil_div(p.width, p.window);
  for (int64_t w = first; w < first + windows; ++w) {
    const int64_t top = w / across * p.window, left = w % across * p.window;
    for (int64_t y = top; y < top + p.window; ++y)
      for (int64_t x = left; x < left + p.window; ++x) *pixels++ = y < p.height && x < p.width ? y * p.width + x : -1;
  }
}

// `n` values of row `row` of a tensor, converted; zeros for padding.
template <class A>
FK_INLINE void gather(const struct fk_array& x, int64_t row, int64_t n, bool present, A* to) {
  if (!present)
    copy_row((const float*)nullptr, 0, n, to);
  else if (x.dtype == FK_F32)
    copy_row(as_float(x) + row * n, n, n, to);
  else
    copy_row(as_bf16(x) + row * n, n, n, to);
}

template <class A>
FK_INLINE void fill_qkv(const struct fk_local_attention& p, int64_t image, int64_t rows, const LocalScratch<A>& s) {
  const int64_t start = image * p.height * p.width;
  if (!p.qkv.panels) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = start + s.pixels[i];
      const bool present = s.pixels[i] >= 0;
      A* to = s.qkv + i * s.ldq;
      gather(p.x, row, p.in_channels, present, to);
      if (!p.k.data) continue;
      gather(p.k, row, p.channels, present, to + p.channels);
      gather(p.v, row, p.value_channels, present, to + 2 * p.channels);
    }
    return;
  }
  const int64_t padded = round_up(p.in_channels, 2);
  for (int64_t i = 0; i < rows; ++i)
    if (s.pixels[i] < 0)
      copy_row((const float*)nullptr, 0, padded, s.normed + i * s.ldn);
    else
      any_norm_row(p.x, (start + s.pixels[i]) * p.in_channels, p.in_channels, padded, p.norm, image,
                   s.normed + i * s.ldn);
  product(
      s.normed, s.ldn, rows, p.qkv, 0, ceil_div(p.qkv.n, kPanel),
      [&](int64_t row, int64_t height, int64_t column, const float* tile) {
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < kPanel; j += FK_VL)
            store(s.qkv + (row + i) * s.ldq + column + j, load(tile + i * kPanel + j) + load(p.qkv.bias + column + j));
      },
      p.qkv.n);
}

// All heads of one window, whose rows start at `first`.
template <class A>
FK_INLINE void attend_window(const struct fk_local_attention& p, int64_t first, const LocalScratch<A>& s) {
  AttentionShape shape = LocalScratch<A>::shape(p);
  const int64_t d = shape.d, dv = shape.dv;
  if (p.masked) {
    bool padded = false;
    for (int64_t i = 0; i < shape.keys; ++i) {
      s.mask[i] = s.pixels[first + i] < 0 ? -__builtin_inff() : 0.0f;
      padded |= s.pixels[first + i] < 0;
    }
    shape.mask = padded ? s.mask : nullptr;
  }
  const struct fk_array qkv = {s.qkv + first * s.ldq, dtype_of(s.qkv), 0};
  for (int64_t h = 0; h < p.heads; ++h) {
    int64_t key_stride;
    const A* keys =
        operand_rows(qkv, p.channels + h * d, s.ldq, shape.keys, d, s.attention, s.attention.keys, &key_stride);
    pack_values(qkv, 2 * p.channels + h * dv, s.ldq, shape.keys, dv, s.attention.values);
    for (int64_t r = 0; r < shape.keys; r += kPanel) {
      const int64_t queries = min64(kPanel, shape.keys - r);
      pack_queries(qkv, r * s.ldq + h * d, s.ldq, queries, d, s.attention);
      attend(shape, keys, key_stride, queries, dv, p.bias ? p.bias + h * shape.keys * p.bias_stride + r : nullptr,
             s.attention);
      for (int64_t i = 0; i < queries; ++i)
        copy_row(s.attention.head + i * s.attention.ldv, dv, dv, s.rows + (first + r + i) * s.lda + h * dv);
    }
  }
}

template <class A>
FK_INLINE void local_attention_task(const struct fk_local_attention& p, int64_t task, void* scratch) {
  const LocalScratch<A> s = LocalScratch<A>::layout(p, scratch);
  const int64_t image = task / p.tasks_per_image, first = task % p.tasks_per_image * p.windows_per_task;
  const int64_t all = ceil_div(p.height, p.window) * ceil_div(p.width, p.window);
  const int64_t windows = min64(p.windows_per_task, all - first), area = p.window * p.window;
  const int64_t rows = windows * area, start = image * p.height * p.width;
  find_pixels(p, first, windows, s.pixels);
  fill_qkv(p, image, rows, s);
  for (int64_t w = 0; w < windows; ++w) attend_window(p, w * area, s);
  const int64_t width = p.projection.panels ? p.projection.n : p.value_channels;
  if (p.projection.panels) {
    if (p.value_channels % 2)
      for (int64_t i = 0; i < rows; ++i) from_float(s.rows + i * s.lda + p.value_channels, 0.0f);
    product(
        s.rows, s.lda, rows, p.projection, 0, ceil_div(p.projection.n, kPanel),
        [&](int64_t row, int64_t height, int64_t column, const float* tile) {
          for (int64_t i = 0; i < height; ++i)
            if (s.pixels[row + i] >= 0)
              write_tile(tile + i * kPanel, kPanel, 1, start + s.pixels[row + i], column, p.projection, p.out,
                         p.out_dtype, p.residual);
        },
        p.projection.n);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      if (s.pixels[i] >= 0) write_row(s.rows + i * s.lda, width, start + s.pixels[i], p.residual, p.out, p.out_dtype);
  }
  if (!p.moments) return;
  double* sums = p.moments + 3 * task;
  sums[0] = sums[1] = sums[2] = 0.0;
  for (int64_t i = 0; i < rows; ++i)
    if (s.pixels[i] >= 0) add_rows(p.out, p.out_dtype, (start + s.pixels[i]) * width, 1, width, sums);
}

int64_t scratch_local_attention(const struct fk_local_attention* p) {
  return LocalScratch<float>::layout(*p, nullptr).bytes;
}

void local_attention(const struct fk_local_attention* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->low_precision) return local_attention_task<bf16>(*p, task, scratch);
#endif
  local_attention_task<float>(*p, task, scratch);
}

}  // namespace
