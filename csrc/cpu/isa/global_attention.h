// Attention of a block of queries against all keys of one image, all heads; norm and projection of the queries in
// front, output projection and residual behind.
#pragma once

#include "attention.h"

namespace {

// The rows of a task around the attention proper.
template <class A>
struct GlobalAttentionScratch {
  AttentionScratch<A> attention;
  A* normed;   // [rows][ldn] q's rows behind the norm
  A* queries;  // [rows][ldq] the projected queries
  A* rows;     // [rows][lda] heads side by side
  int64_t ldn, ldq, lda, bytes;

  FK_INLINE GlobalAttentionScratch layout(const struct fk_global_attention& p, void* base) {
    GlobalAttentionScratch s;
    char* at = (char*)base;
    s.attention = AttentionScratch<A>::layout(attention_shape(p), &at);
    s.ldn = round_up(p.q_channels, 2) + kRowPad;
    s.ldq = round_up(p.channels, kPanel) + kRowPad;
    s.lda = round_up(p.value_channels, 2) + kRowPad;
    s.normed = (A*)at;
    at += prepares(p) ? round_up(p.rows_per_task * s.ldn * (int64_t)sizeof(A), 64) : 0;
    s.queries = (A*)at;
    at += p.query.panels ? round_up(p.rows_per_task * s.ldq * (int64_t)sizeof(A), 64) : 0;
    s.rows = (A*)at;
    at += round_up(p.rows_per_task * s.lda * (int64_t)sizeof(A), 64);
    s.bytes = at - (char*)base;
    return s;
  }

  FK_INLINE AttentionShape attention_shape(const struct fk_global_attention& p) {
    AttentionShape shape = {p.keys, p.channels / p.heads, p.value_channels / p.heads, p.scale, p.bias_stride, nullptr};
    return shape;
  }
  // Whether the rows of q are anything else than the queries.
  static bool prepares(const struct fk_global_attention& p) {
    return p.norm.kind != FK_NO_NORM || p.query.panels || p.add_query_input;
  }
};

template <class A>
FK_INLINE void attention_task(const struct fk_global_attention& p, int64_t task, void* scratch) {
  typedef GlobalAttentionScratch<A> Scratch;
  const Scratch s = Scratch::layout(p, scratch);
  const AttentionShape shape = Scratch::attention_shape(p);
  const int64_t image = task / p.tasks_per_image, first = task % p.tasks_per_image * p.rows_per_task;
  const int64_t rows = min64(p.rows_per_task, p.queries - first), start = image * p.queries + first;
  const int64_t d = shape.d, dv = shape.dv;
  struct fk_array q = p.q;
  int64_t q_offset = start * p.q_stride, q_stride = p.q_stride;
  if (Scratch::prepares(p)) {
    for (int64_t i = 0; i < rows; ++i)
      any_norm_row(p.q, (start + i) * p.q_stride, p.q_channels, round_up(p.q_channels, 2), p.norm, image,
                   s.normed + i * s.ldn);
    q.data = s.normed;
    q.dtype = dtype_of(s.normed);
    q_offset = 0;
    q_stride = s.ldn;
  }
  if (p.query.panels) {
    product(
        s.normed, s.ldn, rows, p.query, 0, ceil_div(p.query.n, kPanel),
        [&](int64_t row, int64_t height, int64_t column, const float* sums) {
          for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < kPanel; j += FK_VL)
              store(s.queries + (row + i) * s.ldq + column + j,
                    load(sums + i * kPanel + j) + load(p.query.bias + column + j));
        },
        p.query.n);
    q.data = s.queries;
    q_stride = s.ldq;
  }
  for (int64_t h = 0; h < p.heads; ++h) {
    int64_t key_stride;
    const A* keys = operand_rows(p.k, image * p.keys * p.k_stride + h * d, p.k_stride, p.keys, d, s.attention,
                                 s.attention.keys, &key_stride);
    pack_values(p.v, image * p.keys * p.v_stride + h * dv, p.v_stride, p.keys, dv, s.attention.values);
    for (int64_t r = 0; r < rows; r += kPanel) {
      const int64_t queries = min64(kPanel, rows - r);
      pack_queries(q, q_offset + r * q_stride + h * d, q_stride, queries, d, s.attention);
      attend(shape, keys, key_stride, queries, dv, p.bias ? p.bias + h * p.keys * p.bias_stride + first + r : nullptr,
             s.attention);
      for (int64_t i = 0; i < queries; ++i) {
        A* to = s.rows + (r + i) * s.lda + h * dv;
        const float* from = s.attention.head + i * s.attention.ldv;
        if (p.add_query_input)
          add_rows_into(from, s.normed + (r + i) * s.ldn + h * dv, dv, to);
        else
          copy_row(from, dv, dv, to);
      }
    }
  }
  if (p.projection.panels) {
    if (p.value_channels % 2)
      for (int64_t i = 0; i < rows; ++i) from_float(s.rows + i * s.lda + p.value_channels, 0.0f);
    product(
        s.rows, s.lda, rows, p.projection, 0, ceil_div(p.projection.n, kPanel),
        [&](int64_t row, int64_t height, int64_t column, const float* sums) {
          write_tile(sums, kPanel, height, start + row, column, p.projection, p.out, p.out_dtype, p.residual);
        },
        p.projection.n);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      write_row(s.rows + i * s.lda, p.value_channels, start + i, p.residual, p.out, p.out_dtype);
  }
  if (p.moments) {
    const int64_t width = p.projection.panels ? p.projection.n : p.value_channels;
    double* sums = p.moments + 3 * task;
    sums[0] = sums[1] = sums[2] = 0.0;
    add_rows(p.out, p.out_dtype, start * width, rows, width, sums);
  }
}

int64_t scratch_global_attention(const struct fk_global_attention* p) {
  return GlobalAttentionScratch<float>::layout(*p, nullptr).bytes;
}

void global_attention(const struct fk_global_attention* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->low_precision) return attention_task<bf16>(*p, task, scratch);
#endif
  attention_task<float>(*p, task, scratch);
}

}  // namespace
