// A strided dense convolution over an NHWC map as a product, with LayerNorm on the way out.
#pragma once

#include "rows.h"

namespace {

template <class A>
struct EmbeddingScratch {
  A* rows;     // [rows][lda]: the k x k x C neighbourhood of each output pixel
  float* out;  // [rows][ldo]
  int64_t lda, ldo, bytes;

  FK_INLINE EmbeddingScratch layout(const struct fk_patch_embedding& p, void* base) {
    EmbeddingScratch s;
    s.lda = round_up(p.linear.k, 2) + kRowPad;
    s.ldo = round_up(p.linear.n, kPanel) + kRowPad;
    char* at = (char*)base;
    s.rows = (A*)at;
    at += round_up(p.rows_per_task * s.lda * (int64_t)sizeof(A), 64);
    s.out = (float*)at;
    at += p.rows_per_task * s.ldo * 4;
    s.bytes = at - (char*)base;
    return s;
  }
};

template <class T, class A>
FK_INLINE void gather_neighbourhood(const struct fk_patch_embedding& p, int64_t pixel, A* to, int64_t padded) {
  const int64_t ox = pixel % p.out_w, oy = pixel / p.out_w % p.out_h, image = pixel / p.out_w / p.out_h;
  const int64_t left = ox * p.stride - p.padding, top = oy * p.stride - p.padding;
  // A neighbourhood that lies wholly beside the map has no pixels in it.
  const int64_t from_x = min64(max64(left, 0), left + p.kernel), to_x = max64(from_x, min64(left + p.kernel, p.width));
  const int64_t line = p.kernel * p.channels;
  const T* x = (const T*)p.x.data + image * p.height * p.width * p.channels;
  for (int64_t ky = 0; ky < p.kernel; ++ky, to += line) {
    const int64_t y = top + ky;
    if (y < 0 || y >= p.height) {
      copy_row(x, 0, line, to);
      continue;
    }
    const int64_t skipped = (from_x - left) * p.channels, present = (to_x - from_x) * p.channels;
    copy_row(x, 0, skipped, to);
    const T* from = x + (y * p.width + from_x) * p.channels;
    if (p.in_norm.kind == FK_NO_NORM) {
      copy_row(from, present, line - skipped, to + skipped);
      continue;
    }
    for (int64_t at = 0; at < present; at += p.channels)
      normalize_row(from + at, p.channels, p.channels, p.in_norm, to + skipped + at);
    copy_row(x, 0, line - skipped - present, to + skipped + present);
  }
  copy_row(x, 0, padded - p.linear.k, to);
}

// A finished tile: bias, activation, affine.
template <class A, fk_activation Activation>
FK_INLINE void place_result(const struct fk_patch_embedding& p, const float* tile, int64_t height, int64_t column,
                            float* out, int64_t ldo) {
  for (int64_t j = 0; j < kPanel; j += FK_VL) {
    const vf bias = load(p.linear.bias + column + j);
    const vf scale = p.scale ? load(p.scale + column + j) : splat(1.0f);
    const vf shift = p.scale ? load(p.shift + column + j) : splat(0.0f);
    for (int64_t i = 0; i < height; ++i) {
      vf y = activate<sizeof(A) == 2, Activation>(load(tile + i * kPanel + j) + bias);
      if (p.scale) y = y * scale + shift;
      store(out + i * ldo + j, y);
    }
  }
}

template <class A>
FK_INLINE void embedding_task(const struct fk_patch_embedding& p, int64_t task, void* scratch) {
  const EmbeddingScratch<A> s = EmbeddingScratch<A>::layout(p, scratch);
  const int64_t first = task * p.rows_per_task;
  const int64_t rows = min64(p.rows_per_task, p.batch * p.out_h * p.out_w - first);
  const int64_t padded = round_up(p.linear.k, 2);
  for (int64_t i = 0; i < rows; ++i)
    if (p.x.dtype == FK_F32)
      gather_neighbourhood<float>(p, first + i, s.rows + i * s.lda, padded);
    else
      gather_neighbourhood<bf16>(p, first + i, s.rows + i * s.lda, padded);
  const A* panels = (const A*)p.linear.panels;
  with_activation(p.activation, [&](auto activation) {
    product(s.rows, s.lda, rows, panels, p.linear.k, 0, ceil_div(p.linear.n, kPanel), panels,
            [&](int64_t row, int64_t height, int64_t column, const float* tile) {
              place_result<A, activation.value>(p, tile, height, column, s.out + row * s.ldo + column, s.ldo);
            });
  });
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (first + i) * p.linear.n;
    if (p.out_dtype == FK_F32)
      normalize_row(s.out + i * s.ldo, p.linear.n, p.linear.n, p.norm, (float*)p.out + at);
    else
      normalize_row(s.out + i * s.ldo, p.linear.n, p.linear.n, p.norm, (bf16*)p.out + at);
  }
}

int64_t scratch_patch_embedding(const struct fk_patch_embedding* p) {
  return EmbeddingScratch<float>::layout(*p, nullptr).bytes;
}

void patch_embedding(const struct fk_patch_embedding* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->linear.low_precision) return embedding_task<bf16>(*p, task, scratch);
#endif
  embedding_task<float>(*p, task, scratch);
}

}  // namespace
