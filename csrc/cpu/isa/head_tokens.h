// Normalised tokens with their mean, and the tokens that are made of each head's part of it.
#pragma once

#include "activations.h"
#include "rows.h"

namespace {

// One row by its statistics on its way out, and into the sums.
template <class Out>
FK_INLINE void normalize_token(const float* x, int64_t n, const struct fk_norm& norm, float* sums, Out* out) {
  const bool normed = norm.kind == FK_LAYER_NORM;
  const RowStatistics s = normed ? row_statistics(x, n, norm.eps) : RowStatistics{0.0f, 1.0f};
  const vf m = splat(s.mean), r = splat(s.rstd);
  int64_t c = 0;
  for (; c + FK_VL <= n; c += FK_VL) {
    vf y = load(x + c);
    if (normed) y = (y - m) * r * load(norm.weight + c) + load(norm.bias + c);
    store(sums + c, load(sums + c) + y);
    if (out) store(out + c, y);
  }
  for (; c < n; ++c) {
    const float y = normed ? (x[c] - s.mean) * s.rstd * norm.weight[c] + norm.bias[c] : x[c];
    sums[c] += y;
    if (out) from_float(out + c, y);
  }
}

// The rows of one task, and their sums for the mean.
template <class Out>
FK_INLINE void normalize_tokens(const struct fk_head_tokens& p, int64_t task, float* row) {
  const int64_t image = task / p.tasks_per_image, block = task % p.tasks_per_image, n = p.channels;
  const int64_t first = block * p.rows_per_task, last = min64(first + p.rows_per_task, p.tokens);
  const int64_t padded = round_up(n, FK_VL);
  float* sums = p.sums + task * padded;
  for (int64_t c = 0; c < padded; c += FK_VL) store(sums + c, splat(0.0f));
  for (int64_t i = first; i < last; ++i) {
    const int64_t at = (image * p.tokens + i) * n;
    const float* x = (const float*)p.x.data + at;
    if (p.x.dtype == FK_BF16) {
      copy_row((const bf16*)p.x.data + at, n, n, row);
      x = row;
    }
    normalize_token(x, n, p.norm, sums, p.out ? (Out*)p.out + (image * (p.tokens + p.heads) + i) * n : nullptr);
  }
}

int64_t scratch_normalize_tokens(const struct fk_head_tokens* p) { return round_up(p->channels, FK_VL) * 4; }

void normalize_tokens(const struct fk_head_tokens* p, int64_t task, void* scratch) {
  if (p->out_dtype == FK_F32) return normalize_tokens<float>(*p, task, (float*)scratch);
  normalize_tokens<bf16>(*p, task, (float*)scratch);
}

template <class A>
struct HeadTokensScratch {
  A* means;      // [heads][lda]
  float* heads;  // [heads][ldo]
  float* mean;   // [C]
  int64_t lda, ldo, bytes;

  FK_INLINE HeadTokensScratch layout(const struct fk_head_tokens& p, void* base) {
    HeadTokensScratch s;
    s.lda = round_up(p.linear.k, 2) + kRowPad;
    s.ldo = round_up(p.linear.n, kPanel) + kRowPad;
    char* at = (char*)base;
    s.means = (A*)at;
    at += round_up(p.heads * s.lda * (int64_t)sizeof(A), 64);
    s.heads = (float*)at;
    at += p.heads * s.ldo * 4;
    s.mean = (float*)at;
    at += round_up(p.channels, FK_VL) * 4;
    s.bytes = at - (char*)base;
    return s;
  }
};

template <class A, class Out>
FK_INLINE void make_head_tokens(const struct fk_head_tokens& p, int64_t image, const HeadTokensScratch<A>& s) {
  const int64_t n = p.channels, padded = round_up(n, FK_VL), d = p.linear.k;
  const vf share = splat(1.0f / (float)p.tokens);
  for (int64_t c = 0; c < padded; c += FK_VL) {
    vf total = splat(0.0f);
    for (int64_t t = 0; t < p.tasks_per_image; ++t)
      total += load(p.sums + (image * p.tasks_per_image + t) * padded + c);
    store(s.mean + c, total * share);
  }
  for (int64_t h = 0; h < p.heads; ++h) copy_row(s.mean + h * d, d, round_up(d, 2), s.means + h * s.lda);
  product(
      s.means, s.lda, p.heads, p.linear, 0, ceil_div(n, kPanel),
      [&](int64_t row, int64_t height, int64_t column, const float* tile) {
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < kPanel; j += FK_VL)
            store(s.heads + (row + i) * s.ldo + column + j,
                  load(tile + i * kPanel + j) + load(p.linear.bias + column + j));
      },
      INT64_MAX, 0);
  for (int64_t h = 0; h < p.heads; ++h) {
    float* row = s.heads + h * s.ldo;
    for (int64_t part = 0; part < n; part += d) normalize_row(row + part, d, d, p.head_norm, row + part);
    // What lies behind the row is padding of the product.
    for (int64_t c = 0; c < n; c += FK_VL) store(row + c, activate<sizeof(Out) == 2, FK_GELU>(load(row + c)));
    add_rows_into(row, p.pos_embed + h * n, n, (Out*)p.out + (image * (p.tokens + p.heads) + p.tokens + h) * n);
  }
}

int64_t scratch_head_tokens(const struct fk_head_tokens* p) {
  return HeadTokensScratch<float>::layout(*p, nullptr).bytes;
}

template <class A>
FK_INLINE void make_head_tokens(const struct fk_head_tokens& p, int64_t image, void* scratch) {
  const HeadTokensScratch<A> s = HeadTokensScratch<A>::layout(p, scratch);
  if (p.out_dtype == FK_F32) return make_head_tokens<A, float>(p, image, s);
  make_head_tokens<A, bf16>(p, image, s);
}

void head_tokens(const struct fk_head_tokens* p, int64_t image, void* scratch) {
#if FK_NATIVE_BF16
  if (p->linear.low_precision) return make_head_tokens<bf16>(*p, image, scratch);
#endif
  make_head_tokens<float>(*p, image, scratch);
}

}  // namespace
