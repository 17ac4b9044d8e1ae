// Head tokens behind an attention: their mean goes to the class token.
#pragma once

#include "rows.h"

namespace {

template <class X, class R, class Out>
FK_INLINE void merge_rows(const struct fk_merge_head_tokens& p, int64_t image, int64_t first, int64_t last) {
  const int64_t n = p.channels;
  const X* x = (const X*)p.x.data + image * (p.rows + p.heads) * n;
  const R* residual = p.residual.data ? (const R*)p.residual.data + image * p.rows * n : nullptr;
  Out* out = (Out*)p.out + image * p.rows * n;
  // `count` values from `at` on; those of the class token get `more`.
  const auto put = [&](int64_t at, int64_t count, vf more) {
    const bool whole = count == FK_VL;
    vf y = (whole ? load(x + at) : load_tail(x + at, count)) + more;
    if (residual) y += whole ? load(residual + at) : load_tail(residual + at, count);
    if (whole)
      store(out + at, y);
    else
      store_tail(out + at, y, count);
  };
  for (int64_t at = max64(first, 1) * n; at < last * n; at += FK_VL) put(at, min64(FK_VL, last * n - at), splat(0.0f));
  if (first > 0) return;
  const vf heads = splat((float)p.heads);
  for (int64_t c = 0; c < n; c += FK_VL) {
    const int64_t count = min64(FK_VL, n - c);
    vf sum = splat(0.0f);
    for (int64_t head = 0; head < p.heads; ++head) sum += load_tail(x + (p.rows + head) * n + c, count);
    put(c, count, sum / heads);
  }
}

template <class X>
FK_INLINE void merge_rows(const struct fk_merge_head_tokens& p, int64_t image, int64_t first, int64_t last) {
  if (p.out_dtype == FK_BF16) return merge_rows<X, bf16, bf16>(p, image, first, last);
  if (p.residual.dtype == FK_BF16) return merge_rows<X, bf16, float>(p, image, first, last);
  merge_rows<X, float, float>(p, image, first, last);
}

void merge_head_tokens(const struct fk_merge_head_tokens* p, int64_t task) {
  const int64_t image = task / p->tasks_per_image, first = task % p->tasks_per_image * p->rows_per_task;
  const int64_t last = min64(first + p->rows_per_task, p->rows);
  if (p->x.dtype == FK_F32) return merge_rows<float>(*p, image, first, last);
  merge_rows<bf16>(*p, image, first, last);
}

}  // namespace
