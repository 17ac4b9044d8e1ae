// DHVT's class token behind its MLP, which passes it by: multiplied by a gate.
#pragma once

#include "activations.h"
#include "rows.h"

namespace {

// `count` values of an array of either type.
FK_INLINE vf load_some(const struct fk_array& x, int64_t at, int64_t count) {
  return x.dtype == FK_F32 ? load_tail((const float*)x.data + at, count) : load_tail((const bf16*)x.data + at, count);
}

// A row of `n` values as floats, zeros behind it up to a whole vector.
FK_INLINE void widen_row(const struct fk_array& x, int64_t at, int64_t n, float* out) {
  for (int64_t c = 0; c < n; c += FK_VL) store(out + c, load_some(x, at + c, min64(FK_VL, n - c)));
}

template <class T>
FK_INLINE float dot_row(const T* weight, const float* x, int64_t k) {
  vf s0 = splat(0.0f), s1 = splat(0.0f);
  int64_t i = 0;
  for (; i + 2 * FK_VL <= k; i += 2 * FK_VL) {
    s0 += load(weight + i) * load(x + i);
    s1 += load(weight + i + FK_VL) * load(x + i + FK_VL);
  }
  for (; i < k; i += FK_VL) {
    const int64_t count = min64(FK_VL, k - i);
    s0 += load_tail(weight + i, count) * load_tail(x + i, count);
  }
  return sum(s0 + s1);
}

// out[n] = weight[n][k] x + bias.
FK_INLINE void linear_row(const struct fk_array& weight, const struct fk_array& bias, const float* x, int64_t n,
                          int64_t k, float* out) {
  for (int64_t j = 0; j < n; ++j)
    out[j] = weight.dtype == FK_F32 ? dot_row((const float*)weight.data + j * k, x, k)
                                    : dot_row((const bf16*)weight.data + j * k, x, k);
  if (!bias.data) return;
  for (int64_t j = 0; j < n; j += FK_VL) {
    const int64_t count = min64(FK_VL, n - j);
    store_tail(out + j, load_tail(out + j, count) + load_some(bias, j, count), count);
  }
}

int64_t scratch_gate_class_token(const struct fk_class_token* p) {
  return (2 * round_up(p->channels, FK_VL) + round_up(p->hidden, FK_VL)) * 4;
}

void gate_class_token(const struct fk_class_token* p, int64_t image, void* scratch) {
  const int64_t n = p->channels, first = image * p->rows * n;
  float *row = (float*)scratch, *gate = row + round_up(n, FK_VL), *hidden = gate + round_up(n, FK_VL);
  widen_row(p->mean, image * n, n, row);
  linear_row(p->weight1, p->bias1, row, p->hidden, n, hidden);
  with_activation(p->activation, [&](auto activation) {
    for (int64_t c = 0; c < p->hidden; c += FK_VL) {
      const int64_t count = min64(FK_VL, p->hidden - c);
      store_tail(hidden + c, activate<false, activation.value>(load_tail(hidden + c, count)), count);
    }
  });
  linear_row(p->weight2, p->bias2, hidden, n, p->hidden, gate);
  widen_row(p->x, first, n, row);
  const RowStatistics s = p->normed ? row_statistics(row, n, p->eps) : RowStatistics{0.0f, 1.0f};
  for (int64_t c = 0; c < n; c += FK_VL) {
    const int64_t count = min64(FK_VL, n - c);
    vf y = (load_tail(row + c, count) - splat(s.mean)) * splat(s.rstd);
    if (p->norm_weight.data) y *= load_some(p->norm_weight, c, count);
    if (p->norm_bias.data) y += load_some(p->norm_bias, c, count);
    y = load_some(p->out, first + c, count) + y * load_tail(gate + c, count);
    if (p->out.dtype == FK_F32)
      store_tail((float*)p->out.data + first + c, y, count);
    else
      store_tail((bf16*)p->out.data + first + c, y, count);
  }
}

}  // namespace
