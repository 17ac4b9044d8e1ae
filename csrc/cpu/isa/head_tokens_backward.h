// Gradients around the head tokens' linear: of the activation and norm behind it, and of the tokens whose mean it
// reads.
#pragma once

#include "backward.h"
#include "head_tokens.h"

namespace {

// One head token: from its gradient to that of the normalised parts in front of the activation.
template <class H, class Grad>
FK_INLINE void head_slopes(const struct fk_head_tokens_backward& p, int64_t row, float* part) {
  const int64_t n = p.channels, d = n / p.heads, image = row / p.heads, head = row % p.heads;
  const Grad* grad = (const Grad*)p.grad.data + (image * (p.tokens + p.heads) + p.tokens + head) * n;
  for (int64_t first = 0; first < n; first += d) {
    normalize_row((const H*)p.linear_result.data + row * n + first, d, round_up(d, FK_VL), p.head_norm, part);
    float* to = p.head_slopes + row * n + first;
    for (int64_t c = 0; c < d; c += FK_VL) {
      vf slope;
      activate<false, FK_GELU>(load(part + c), &slope);
      if (c + FK_VL <= d)
        store(to + c, slope * load(grad + first + c));
      else
        store_tail(to + c, slope * load_tail(grad + first + c, d - c), d - c);
    }
  }
}

void head_tokens_slopes(const struct fk_head_tokens_backward* p, int64_t row, void* scratch) {
  float* part = (float*)scratch;
  if (p->linear_result.dtype == FK_F32 && p->grad.dtype == FK_F32)
    head_slopes<float, float>(*p, row, part);
  else if (p->linear_result.dtype == FK_F32)
    head_slopes<float, bf16>(*p, row, part);
  else
    head_slopes<bf16, bf16>(*p, row, part);
}

int64_t scratch_head_tokens_backward(const struct fk_head_tokens_backward* p) {
  return (round_up(p->channels, FK_VL) + 4 * p->channels) * 4;
}

// A block of an image's tokens: their own gradients and that of their mean, back through the norm.
void head_tokens_backward(const struct fk_head_tokens_backward* p, int64_t task, void* scratch) {
  const int64_t n = p->channels, image = task / p->tasks_per_image;
  const int64_t first = task % p->tasks_per_image * p->rows_per_task;
  const int64_t rows = min64(p->rows_per_task, p->tokens - first);
  const float* mean = p->mean_grads + image * n;
  float *row = (float*)scratch, *sums = row + round_up(n, FK_VL);
  const float share = 1.0f / (float)p->tokens;
  float* total = p->affine ? p->affine + task * round_up(2 * n, kPanel) : nullptr;
  if (total) clear(total, round_up(2 * n, kPanel));
  const RowSums affine = RowSums::over(sums, 2 * n, total);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (image * (p->tokens + p->heads) + first + i) * n;
    for (int64_t c = 0; c < n; c += FK_VL) {
      const int64_t left = n - c;
      const vf own = p->grad.dtype == FK_F32 ? left >= FK_VL ? load((const float*)p->grad.data + at + c)
                                                             : load_tail((const float*)p->grad.data + at + c, left)
                     : left >= FK_VL         ? load((const bf16*)p->grad.data + at + c)
                                             : load_tail((const bf16*)p->grad.data + at + c, left);
      store(row + c, own + (left >= FK_VL ? load(mean + c) : load_tail(mean + c, left)) * splat(share));
    }
    norm_backward_row(p->x, image * p->tokens + first + i, row, n, p->norm, p->dx, fk_array{},
                      total ? affine.near : nullptr);
    RowSums::next(affine, i, rows);
  }
}

}  // namespace
