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

// Sums down a column of lanes of `value(i)`, a few rows at a time so that no running sum is long.
template <class Value>
FK_INLINE vf column_sum(int64_t keys, Value value) {
  vf total = splat(0.0f);
  for (int64_t first = 0; first < keys; first += kNearRows) {
    const int64_t last = min64(first + kNearRows, keys);
    vf s0 = splat(0.0f), s1 = splat(0.0f);
    int64_t i = first;
    for (; i + 2 <= last; i += 2) {
      s0 += value(i);
      s1 += value(i + 1);
    }
    if (i < last) s0 += value(i);
    total += s0 + s1;
  }
  return total;
}

// Scores of a panel to probabilities.
FK_INLINE void softmax_panel(float* scores, int64_t keys, float scale) {
  for (int64_t j = 0; j < kPanel; j += FK_VL) {
    float* column = scores + j;
    vf m = column_maximum(column, keys, splat(scale));
    m = m == splat(-__builtin_inff()) ? splat(0.0f) : m;
    exponentiate(column, keys, splat(scale), m, column);
    const vf inverse = splat(1.0f) / column_sum(keys, [&](int64_t i) { return load(column + i * kPanel); });
    for (int64_t i = 0; i < keys; ++i) store(column + i * kPanel, load(column + i * kPanel) * inverse);
  }
}

// Gradients of the probabilities to those of the scores, which `bias` gets as they are, unless null, and the rest times
// the scale.
FK_INLINE void softmax_backward_panel(const float* probabilities, float* slopes, int64_t keys, float scale, float* bias,
                                      bool accumulate) {
  for (int64_t j = 0; j < kPanel; j += FK_VL) {
    const vf along = column_sum(
        keys, [&](int64_t i) { return load(probabilities + i * kPanel + j) * load(slopes + i * kPanel + j); });
    for (int64_t i = 0; i < keys; ++i) {
      float* at = slopes + i * kPanel + j;
      const vf slope = load(probabilities + i * kPanel + j) * (load(at) - along);
      if (bias) {
        float* to = bias + i * kPanel + j;
        store(to, accumulate ? load(to) + slope : slope);
      }
      store(at, slope * splat(scale));
    }
  }
}

// The token that row i of a set stands for; `count` rows make a set that lies as it is.
FK_INLINE int64_t token_of(const struct fk_attention_backward& p, int64_t set, int64_t i, int64_t count) {
  if (!p.window_tokens) return set * count + i;
  return set / p.sets_per_image * p.tokens + p.window_tokens[set % p.sets_per_image * count + i];
}

// `rows` rows of a head from row `first` of a set on; zeros behind d.
template <class A>
FK_INLINE void stage_set(const struct fk_attention_backward& p, const struct fk_array& x, int64_t stride,
                         int64_t column, int64_t set, int64_t first, int64_t rows, int64_t count, int64_t d, A* out,
                         int64_t ldo) {
  for (int64_t i = 0; i < rows; ++i)
    stage(x, token_of(p, set, first + i, count) * stride + column, 0, 1, d, round_up(d, 2), out + i * ldo, ldo);
}

// Rows of fp32 to where they belong in a result.
FK_INLINE void write_set(const struct fk_attention_backward& p, const float* from, int64_t ldf, int64_t n, void* out,
                         fk_dtype dtype, int64_t stride, int64_t column, int64_t set, int64_t first, int64_t rows,
                         int64_t count) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = token_of(p, set, first + i, count) * stride + column;
    if (dtype == FK_F32)
      copy_row(from + i * ldf, n, n, (float*)out + at);
    else
      copy_row(from + i * ldf, n, n, (bf16*)out + at);
  }
}

// One head of one set.
template <class A>
FK_INLINE void attention_backward_set(const struct fk_attention_backward& p, int64_t set, int64_t h, float* bias_sums,
                                      bool accumulate, const AttentionBackwardScratch<A>& s) {
  const int64_t d = p.channels / p.heads, dv = p.value_channels / p.heads, pair = kStep<A>;
  stage_set(p, p.k, p.k_stride, h * d, set, 0, p.keys, p.keys, d, s.keys, s.ldk);
  stage_set(p, p.v, p.v_stride, h * dv, set, 0, p.keys, p.keys, dv, s.values, s.ldr);
  if (p.dq) panels_of_rows(s.keys, s.ldk, p.keys, d, s.depth, s.key_panels);
  if (p.result) panels_of_rows(s.values, s.ldr, p.keys, dv, s.depth, s.value_panels);
  if (p.queries == 0) {
    clear(s.d_keys, p.keys * s.ldd);
    clear(s.d_values, p.keys * s.ldv);
  }
  for (int64_t r = 0; r < p.queries; r += kPanel) {
    const int64_t queries = min64(kPanel, p.queries - r);
    stage_set(p, p.q, p.q_stride, h * d, set, r, queries, p.queries, d, s.query_rows, s.ldk);
    stage_set(p, p.grad, p.value_channels, h * dv, set, r, queries, p.queries, dv, s.grad_rows, s.ldr);
    transpose((const uint32_t*)s.query_rows, s.ldk / pair, queries, ceil_div(d, pair), (uint32_t*)s.queries, kPanel,
              kPanel);
    across(s.keys, s.ldk, p.keys, s.queries, round_up(d, pair), s.scores);
    float scale = p.scale * 1.44269504f;
    if (p.bias || p.mask) {
      const auto add = p.bias ? p.mask ? add_bias<true, true> : add_bias<true, false> : add_bias<false, true>;
      add(s.scores, p.keys, splat(scale), p.bias ? p.bias + h * p.keys * p.bias_stride + r : nullptr, p.bias_stride,
          p.mask ? p.mask + set % p.sets_per_image * p.keys : nullptr);
      scale = 1.0f;
    }
    softmax_panel(s.scores, p.keys, scale);
    const A* probabilities = as_rows(s.scores, p.keys * kPanel, s.probability_rows);
    if (p.result) {
      int64_t stride = kPanel;
      const A* columns = columns_of_rows(probabilities, p.keys, kPanel, &stride, s.columns);
      from_keys(columns, stride, queries, s.value_panels, p.keys, s.depth, dv, s.result, s.ldv);
      if (p.added)
        for (int64_t i = 0; i < queries; ++i)
          add_rows_into(s.result + i * s.ldv,
                        (const A*)p.added + token_of(p, set, r + i, p.queries) * p.value_channels + h * dv, dv,
                        s.result + i * s.ldv);
      write_set(p, s.result, s.ldv, dv, p.result, dtype_of(s.keys), p.value_channels, h * dv, set, r, queries,
                p.queries);
    }
    if (p.dv) {
      panels_of_rows(s.grad_rows, s.ldr, queries, dv, kPanel, s.grad_panels);
      add_to_keys(probabilities, p.keys, queries, s.grad_panels, dv, s.d_values, s.ldv, r > 0);
    }
    if (!p.dq && !p.dk && !bias_sums) continue;
    transpose((const uint32_t*)s.grad_rows, s.ldr / pair, queries, ceil_div(dv, pair), (uint32_t*)s.grads, kPanel,
              kPanel);
    across(s.values, s.ldr, p.keys, s.grads, round_up(dv, pair), s.slopes);
    softmax_backward_panel(s.scores, s.slopes, p.keys, p.scale, bias_sums ? bias_sums + r * p.keys : nullptr,
                           accumulate);
    const A* slopes = as_rows(s.slopes, p.keys * kPanel, s.slope_rows);
    if (p.dq) {
      int64_t stride = kPanel;
      const A* columns = columns_of_rows(slopes, p.keys, kPanel, &stride, s.columns);
      from_keys(columns, stride, queries, s.key_panels, p.keys, s.depth, d, s.result, s.ldd);
      write_set(p, s.result, s.ldd, d, p.dq, p.dq_dtype, p.dq_stride, h * d, set, r, queries, p.queries);
    }
    if (p.dk) {
      panels_of_rows(s.query_rows, s.ldk, queries, d, kPanel, s.query_panels);
      add_to_keys(slopes, p.keys, queries, s.query_panels, d, s.d_keys, s.ldd, r > 0);
    }
  }
  if (p.dk) write_set(p, s.d_keys, s.ldd, d, p.dk, p.k.dtype, p.dk_stride, h * d, set, 0, p.keys, p.keys);
  if (p.dv) write_set(p, s.d_values, s.ldv, dv, p.dv, p.v.dtype, p.dv_stride, h * dv, set, 0, p.keys, p.keys);
}

template <class A>
FK_INLINE void attention_backward_task(const struct fk_attention_backward& p, int64_t task, void* scratch) {
  const AttentionBackwardScratch<A> s = AttentionBackwardScratch<A>::layout(p, scratch);
  const int64_t partial = task / p.heads, h = task % p.heads;
  const BlockRange range = blocks_of(p.sets, 1, p.partials, partial);
  const int64_t table = round_up(p.queries, kPanel) * p.keys;
  float* bias_sums = p.bias_sums ? p.bias_sums + task * table : nullptr;
  for (int64_t set = range.first; set < range.last; ++set)
    attention_backward_set(p, set, h, bias_sums, set > range.first, s);
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
