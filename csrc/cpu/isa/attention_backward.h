// Gradients of the attention of one head: the probabilities are made again for a panel of queries at a time, keys down
// and queries across as in the forward, and each panel adds to the gradients of all keys and values.
#pragma once

#include "attention.h"
#include "backward.h"

namespace {

template <class A>
struct AttentionBackwardScratch {
  A* query_rows;             // [kPanel][ldk]
  A* grad_rows;              // [kPanel][ldr] of the result
  A* queries;                // [d][kPanel]
  A* grads;                  // [dv][kPanel]
  A* query_panels;           // panels [d][kPanel rows]
  A* grad_panels;            // panels [dv][kPanel rows]
  A* keys;                   // [keys][ldk]
  A* values;                 // [keys][ldr]
  A* key_panels;             // panels [d][keys]
  A* value_panels;           // panels [dv][keys]
  float* scores;             // [keys][kPanel]
  float* slopes;             // [keys][kPanel] gradients of the probabilities, then of the scores
  A* probability_rows;       // bf16: both as rows,
  A* slope_rows;             //
  A* columns;                // and one of them paired along the keys
  float *d_keys, *d_values;  // [keys][ldd], [keys][ldv]
  float* result;             // [kPanel][ldv or ldd]
  int64_t ldk, ldr, ldd, ldv, depth, bytes;

  FK_INLINE AttentionBackwardScratch layout(const struct fk_attention_backward& p, void* base) {
    constexpr bool kLow = sizeof(A) == 2;
    const int64_t size = (int64_t)sizeof(A), d = p.channels / p.heads, dv = p.value_channels / p.heads;
    AttentionBackwardScratch s;
    s.depth = round_up(p.keys, 2);
    s.ldk = round_up(d, 2) + kRowPad;
    s.ldr = round_up(dv, 2) + kRowPad;
    s.ldd = round_up(d, kPanel);
    s.ldv = round_up(dv, kPanel);
    char* at = (char*)base;
    const auto take = [&](int64_t values, int64_t bytes) {
      char* from = at;
      at += round_up(values * bytes, 64);
      return from;
    };
    s.query_rows = (A*)take(kPanel * s.ldk, size);
    s.grad_rows = (A*)take(kPanel * s.ldr, size);
    s.queries = (A*)take(round_up(d, 2) * kPanel, size);
    s.grads = (A*)take(round_up(dv, 2) * kPanel, size);
    s.query_panels = (A*)take(kPanel * s.ldd, size);
    s.grad_panels = (A*)take(kPanel * s.ldv, size);
    s.keys = (A*)take(s.depth * s.ldk, size);
    s.values = (A*)take(s.depth * s.ldr, size);
    s.key_panels = (A*)take(s.depth * s.ldd, size);
    s.value_panels = (A*)take(s.depth * s.ldv, size);
    s.scores = (float*)take(s.depth * kPanel, 4);
    s.slopes = (float*)take(s.depth * kPanel, 4);
    s.probability_rows = (A*)take(kLow ? s.depth * kPanel : 0, size);
    s.slope_rows = (A*)take(kLow ? s.depth * kPanel : 0, size);
    s.columns = (A*)take(kLow ? s.depth * kPanel : 0, size);
    s.d_keys = (float*)take(s.depth * s.ldd, 4);
    s.d_values = (float*)take(s.depth * s.ldv, 4);
    s.result = (float*)take(kPanel * max64(s.ldd, s.ldv), 4);
    s.bytes = at - (char*)base;
    return s;
  }
};

// fp32 works on the scores themselves.
FK_INLINE const float* as_rows(const float* values, int64_t, float*) { return values; }
FK_INLINE const bf16* as_rows(const float* values, int64_t n, bf16* rows) {
  copy_row(values, n, n, rows);
  return rows;
}

// rows^T times what lies across: out[height of `keys`][kPanel].
template <class A>
FK_INLINE void across(const A* rows, int64_t stride, int64_t keys, const A* panel, int64_t depth, float* out) {
  const RowTiles tiles = row_tiles(keys);
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t row = tile_start(tiles, t);
    tile(tile_height(tiles, t), rows + row * stride, stride, panel, depth, out + row * kPanel, kPanel, false,
         fetch_nothing(panel));
  }
}

// out[queries][width] from columns over the keys and panels of them.
template <class A>
FK_INLINE void from_keys(const A* columns, int64_t stride, int64_t queries, const A* panels, int64_t keys,
                         int64_t depth, int64_t width, float* out, int64_t ldo) {
  const RowTiles tiles = row_tiles(queries);
  for (int64_t c = 0; c < width; c += kPanel)
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = tile_start(tiles, t);
      tile<true>(tile_height(tiles, t), columns + row * kStep<A>, stride, panels + c * depth, round_up(keys, kStep<A>),
                 out + row * ldo + c, ldo, false, fetch_nothing(panels));
    }
}

// out[keys][width] += rows[keys][queries] times panels of the queries.
template <class A>
FK_INLINE void add_to_keys(const A* rows, int64_t keys, int64_t queries, const A* panels, int64_t width, float* out,
                           int64_t ldo, bool accumulate) {
  const RowTiles tiles = row_tiles(keys);
  for (int64_t c = 0; c < width; c += kPanel)
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = tile_start(tiles, t);
      tile(tile_height(tiles, t), rows + row * kPanel, kPanel, panels + c * kPanel, round_up(queries, kStep<A>),
           out + row * ldo + c, ldo, accumulate, fetch_nothing(panels));
    }
}

// Scores of a panel to probabilities.
template <class A>
FK_INLINE void softmax_panel(float* scores, int64_t keys, float scale) {
  for (int64_t j = 0; j < kPanel; j += FK_VL) {
    float* column = scores + j;
    vf m = column_maximum(column, keys, splat(scale));
    m = m == splat(-__builtin_inff()) ? splat(0.0f) : m;
    const vf total = exponentiate(column, keys, splat(scale), m, column);
    const vf inverse = splat(1.0f) / total;
    for (int64_t i = 0; i < keys; ++i) store(column + i * kPanel, load(column + i * kPanel) * inverse);
  }
}

// Gradients of the probabilities to those of the scores, times the scale.
FK_INLINE void softmax_backward_panel(const float* probabilities, float* slopes, int64_t keys, float scale) {
  for (int64_t j = 0; j < kPanel; j += FK_VL) {
    vf s0 = splat(0.0f), s1 = splat(0.0f);
    int64_t i = 0;
    for (; i + 2 <= keys; i += 2) {
      s0 += load(probabilities + i * kPanel + j) * load(slopes + i * kPanel + j);
      s1 += load(probabilities + (i + 1) * kPanel + j) * load(slopes + (i + 1) * kPanel + j);
    }
    if (i < keys) s0 += load(probabilities + i * kPanel + j) * load(slopes + i * kPanel + j);
    const vf along = s0 + s1;
    for (i = 0; i < keys; ++i) {
      float* at = slopes + i * kPanel + j;
      store(at, load(probabilities + i * kPanel + j) * (load(at) - along) * splat(scale));
    }
  }
}

// A head's rows behind each other in `buffer`.
template <class A>
FK_INLINE void stage_rows(const struct fk_array& x, int64_t offset, int64_t stride, int64_t rows, int64_t d, A* buffer,
                          int64_t ldo) {
  stage(x, offset, stride, rows, d, round_up(d, 2), buffer, ldo);
}

// Rows of fp32 to a head's slice of a result.
FK_INLINE void write_rows(const float* from, int64_t ldf, int64_t rows, int64_t n, void* out, fk_dtype dtype,
                          int64_t offset, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    if (dtype == FK_F32)
      copy_row(from + i * ldf, n, n, (float*)out + offset + i * stride);
    else
      copy_row(from + i * ldf, n, n, (bf16*)out + offset + i * stride);
}

// One head of one image.
template <class A>
FK_INLINE void attention_backward_task(const struct fk_attention_backward& p, int64_t task, void* scratch) {
  typedef AttentionBackwardScratch<A> Scratch;
  const Scratch s = Scratch::layout(p, scratch);
  const int64_t image = task / p.heads, h = task % p.heads, d = p.channels / p.heads, dv = p.value_channels / p.heads;
  const int64_t key_row = image * p.keys, pair = kStep<A>;
  stage_rows(p.k, key_row * p.k_stride + h * d, p.k_stride, p.keys, d, s.keys, s.ldk);
  stage_rows(p.v, key_row * p.v_stride + h * dv, p.v_stride, p.keys, dv, s.values, s.ldr);
  if (p.dq) panels_of_rows(s.keys, s.ldk, p.keys, d, s.depth, s.key_panels);
  if (p.result) panels_of_rows(s.values, s.ldr, p.keys, dv, s.depth, s.value_panels);
  const bool wants_slopes = p.dq || p.dk;
  if (p.queries == 0) {
    clear(s.d_keys, p.keys * s.ldd);
    clear(s.d_values, p.keys * s.ldv);
  }
  for (int64_t r = 0; r < p.queries; r += kPanel) {
    const int64_t queries = min64(kPanel, p.queries - r), row = image * p.queries + r;
    stage_rows(p.q, row * p.q_stride + h * d, p.q_stride, queries, d, s.query_rows, s.ldk);
    stage_rows(p.grad, row * p.value_channels + h * dv, p.value_channels, queries, dv, s.grad_rows, s.ldr);
    transpose((const uint32_t*)s.query_rows, s.ldk / pair, queries, ceil_div(d, pair), (uint32_t*)s.queries, kPanel,
              kPanel);
    across(s.keys, s.ldk, p.keys, s.queries, round_up(d, pair), s.scores);
    float scale = p.scale * 1.44269504f;
    if (p.bias) {
      add_bias<true, false>(s.scores, p.keys, splat(scale), p.bias + h * p.keys * p.bias_stride + r, p.bias_stride,
                            nullptr);
      scale = 1.0f;
    }
    softmax_panel<A>(s.scores, p.keys, scale);
    const A* probabilities = as_rows(s.scores, p.keys * kPanel, s.probability_rows);
    if (p.result) {
      int64_t stride = kPanel;
      const A* columns = columns_of_rows(probabilities, p.keys, kPanel, &stride, s.columns);
      from_keys(columns, stride, queries, s.value_panels, p.keys, s.depth, dv, s.result, s.ldv);
      write_rows(s.result, s.ldv, queries, dv, p.result, dtype_of(s.keys), row * p.value_channels + h * dv,
                 p.value_channels);
    }
    if (p.dv) {
      panels_of_rows(s.grad_rows, s.ldr, queries, dv, kPanel, s.grad_panels);
      add_to_keys(probabilities, p.keys, queries, s.grad_panels, dv, s.d_values, s.ldv, r > 0);
    }
    if (!wants_slopes) continue;
    transpose((const uint32_t*)s.grad_rows, s.ldr / pair, queries, ceil_div(dv, pair), (uint32_t*)s.grads, kPanel,
              kPanel);
    across(s.values, s.ldr, p.keys, s.grads, round_up(dv, pair), s.slopes);
    softmax_backward_panel(s.scores, s.slopes, p.keys, p.scale);
    const A* slopes = as_rows(s.slopes, p.keys * kPanel, s.slope_rows);
    if (p.dq) {
      int64_t stride = kPanel;
      const A* columns = columns_of_rows(slopes, p.keys, kPanel, &stride, s.columns);
      from_keys(columns, stride, queries, s.key_panels, p.keys, s.depth, d, s.result, s.ldd);
      write_rows(s.result, s.ldd, queries, d, p.dq, p.dq_dtype, row * p.channels + h * d, p.channels);
    }
    if (p.dk) {
      panels_of_rows(s.query_rows, s.ldk, queries, d, kPanel, s.query_panels);
      add_to_keys(slopes, p.keys, queries, s.query_panels, d, s.d_keys, s.ldd, r > 0);
    }
  }
  if (p.dk) write_rows(s.d_keys, s.ldd, p.keys, d, p.dk, p.k.dtype, key_row * p.dk_stride + h * d, p.dk_stride);
  if (p.dv) write_rows(s.d_values, s.ldv, p.keys, dv, p.dv, p.v.dtype, key_row * p.dv_stride + h * dv, p.dv_stride);
}

int64_t scratch_attention_backward(const struct fk_attention_backward* p) {
  const int64_t wide = AttentionBackwardScratch<float>::layout(*p, nullptr).bytes;
  return max64(wide, AttentionBackwardScratch<bf16>::layout(*p, nullptr).bytes);
}

void attention_backward(const struct fk_attention_backward* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->low_precision) return attention_backward_task<bf16>(*p, task, scratch);
#endif
  attention_backward_task<float>(*p, task, scratch);
}

}  // namespace
