// Gradients of the attention of one head: the probabilities are made again for a block of queries at a time, keys down
// and queries across as in the forward, and each block adds to the gradients of all keys and values.
#pragma once

#include "attention.h"
#include "backward.h"

namespace {

// Queries of a block: the more they are, the less often the gradients of keys and values are read and written. The
// scores of a block and their gradients should stay in L2.
constexpr int64_t kMostQueries = 128 / kPanel * kPanel, kMostScores = 16384;

template <class A>
struct AttentionBackwardScratch {
  A* query_rows;             // [block][ldk], like `keys`
  A* grad_rows;              // [block][ldr] of the result, like `values`
  A* queries;                // panels [d][kPanel]
  A* grads;                  // panels [dv][kPanel]
  A* query_panels;           // panels [d][block]
  A* grad_panels;            // panels [dv][block]
  A* keys;                   // [keys][ldk], only where the tensor's own rows cannot be read directly
  A* values;                 // [keys][ldr], the same
  A* key_panels;             // panels [d][keys]
  A* value_panels;           // panels [dv][keys]
  float* scores;             // [keys][block]
  float* slopes;             // [keys][block] gradients of the probabilities, then of the scores
  A* probability_rows;       // bf16: both as rows,
  A* slope_rows;             //
  A* columns;                // and one of them paired along the keys
  float *d_keys, *d_values;  // [keys][ldd], [keys][ldv]
  float* result;             // [block][ldv or ldd]
  int64_t ldk, ldr, ldd, ldv, depth, block, bytes;

  FK_INLINE AttentionBackwardScratch layout(const struct fk_attention_backward& p, void* base) {
    constexpr bool kLow = sizeof(A) == 2;
    const int64_t size = (int64_t)sizeof(A), d = p.channels / p.heads, dv = p.value_channels / p.heads;
    AttentionBackwardScratch s;
    s.depth = round_up(p.keys, 2);
    s.block = min64(min64(kMostQueries, round_up(p.queries, kPanel)),
                    max64(kPanel, kMostScores / max64(1, p.keys) / kPanel * kPanel));
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
    s.query_rows = (A*)take(s.block * s.ldk, size);
    s.grad_rows = (A*)take(s.block * s.ldr, size);
    s.queries = (A*)take(round_up(d, 2) * s.block, size);
    s.grads = (A*)take(round_up(dv, 2) * s.block, size);
    s.query_panels = (A*)take(s.block * s.ldd, size);
    s.grad_panels = (A*)take(s.block * s.ldv, size);
    s.keys = (A*)take(s.depth * s.ldk, size);
    s.values = (A*)take(s.depth * s.ldr, size);
    s.key_panels = (A*)take(s.depth * s.ldd, size);
    s.value_panels = (A*)take(s.depth * s.ldv, size);
    s.scores = (float*)take(s.depth * s.block, 4);
    s.slopes = (float*)take(s.depth * s.block, 4);
    s.probability_rows = (A*)take(kLow ? s.depth * s.block : 0, size);
    s.slope_rows = (A*)take(kLow ? s.depth * s.block : 0, size);
    s.columns = (A*)take(kLow ? s.depth * s.block : 0, size);
    s.d_keys = (float*)take(s.depth * s.ldd, 4);
    s.d_values = (float*)take(s.depth * s.ldv, 4);
    s.result = (float*)take(s.block * max64(s.ldd, s.ldv), 4);
    s.bytes = at - (char*)base;
    return s;
  }
};

// The first `width` values of each row; fp32 works on the scores themselves.
FK_INLINE const float* as_rows(const float* values, int64_t, int64_t, int64_t, float*) { return values; }
FK_INLINE const bf16* as_rows(const float* values, int64_t stride, int64_t count, int64_t width, bf16* rows) {
  for (int64_t i = 0; i < count; ++i) copy_row(values + i * stride, width, width, rows + i * stride);
  return rows;
}

// Rows of queries, or of their gradients, across: panels [d][kPanel].
template <class A>
FK_INLINE void lay_across(const A* rows, int64_t stride, int64_t count, int64_t d, A* panels) {
  const int64_t pair = kStep<A>;
  for (int64_t r = 0; r < count; r += kPanel)
    transpose((const uint32_t*)(rows + r * stride), stride / pair, min64(kPanel, count - r), ceil_div(d, pair),
              (uint32_t*)(panels + r * round_up(d, pair)), kPanel, kPanel);
}

// rows^T times what lies across: out[height of `keys`][block].
template <class A>
FK_INLINE void across(const A* rows, int64_t stride, int64_t keys, const A* panels, int64_t count, int64_t depth,
                      float* out, int64_t ldo) {
  const Panels<A> w = {panels, depth * kPanel, ceil_div(count, kPanel), depth, nullptr};
  products(rows, stride, keys, w, out, ldo, kPanel, false, count);
}

// out[queries][width] from columns over the keys and panels of them.
template <class A>
FK_INLINE void from_keys(const A* columns, int64_t stride, int64_t queries, const A* panels, int64_t keys,
                         int64_t depth, int64_t width, float* out, int64_t ldo) {
  const Panels<A> w = {panels, depth * kPanel, ceil_div(width, kPanel), round_up(keys, kStep<A>), nullptr};
  products<true>(columns, stride, queries, w, out, ldo, kPanel, false, width);
}

// out[keys][width] += rows[keys][queries] times panels of the queries.
template <class A>
FK_INLINE void add_to_keys(const A* rows, int64_t stride, int64_t keys, int64_t queries, const A* panels, int64_t width,
                           float* out, int64_t ldo, bool accumulate) {
  const Panels<A> w = {panels, stride * kPanel, ceil_div(width, kPanel), round_up(queries, kStep<A>), nullptr};
  products(rows, stride, keys, w, out, ldo, kPanel, accumulate, width);
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

// Scores of `queries` columns to probabilities.
FK_INLINE void softmax_columns(float* scores, int64_t stride, int64_t keys, int64_t queries, float scale) {
  for (int64_t j = 0; j < queries; j += FK_VL) {
    float* column = scores + j;
    vf m = column_maximum(column, keys, splat(scale), stride);
    m = m == splat(-__builtin_inff()) ? splat(0.0f) : m;
    exponentiate(column, keys, splat(scale), m, column, stride);
    const vf inverse = splat(1.0f) / column_sum(keys, [&](int64_t i) { return load(column + i * stride); });
    for (int64_t i = 0; i < keys; ++i) store(column + i * stride, load(column + i * stride) * inverse);
  }
}

// Gradients of the probabilities to those of the scores, which `bias` [keys][kPanel] gets as they are, panel by panel,
// unless null, and the rest times the scale.
FK_INLINE void softmax_backward_columns(const float* probabilities, float* slopes, int64_t stride, int64_t keys,
                                        int64_t queries, float scale, float* bias, bool accumulate) {
  for (int64_t j = 0; j < queries; j += FK_VL) {
    const vf along = column_sum(
        keys, [&](int64_t i) { return load(probabilities + i * stride + j) * load(slopes + i * stride + j); });
    float* of_bias = bias ? bias + j / kPanel * kPanel * keys + j % kPanel : nullptr;
    for (int64_t i = 0; i < keys; ++i) {
      float* at = slopes + i * stride + j;
      const vf slope = load(probabilities + i * stride + j) * (load(at) - along);
      if (of_bias) {
        float* to = of_bias + i * kPanel;
        store(to, accumulate ? load(to) + slope : slope);
      }
      store(at, slope * splat(scale));
    }
  }
}

// Where a set's rows lie: `count` of them make a set, in order, or as its windows have it.
struct SetRows {
  const int64_t* tokens;
  int64_t first;

  FK_INLINE SetRows of(const struct fk_attention_backward& p, int64_t set, int64_t count) {
    if (!p.window_tokens) return {nullptr, set * count};
    return {p.window_tokens + set % p.sets_per_image * count, set / p.sets_per_image * p.tokens};
  }
  // The token that row i stands for.
  FK_INLINE int64_t token(const SetRows& s, int64_t i) { return s.first + (s.tokens ? s.tokens[i] : i); }
};

// `count` rows of a head from row `first` of a set on, as they lie in the tensor where a product can read them so, else
// copied to `buffer`. `stride`: that of the buffer, which becomes that of the rows.
template <class A>
FK_INLINE const A* set_rows(const SetRows& set, const struct fk_array& x, int64_t x_stride, int64_t column,
                            int64_t first, int64_t count, int64_t d, A* buffer, int64_t* stride) {
  if (!set.tokens) {
    const A* direct = direct_rows(x, (set.first + first) * x_stride + column, x_stride, d, buffer);
    if (direct) {
      *stride = x_stride;
      return direct;
    }
  }
  for (int64_t i = 0; i < count; ++i)
    stage(x, SetRows::token(set, first + i) * x_stride + column, 0, 1, d, round_up(d, 2), buffer + i * *stride,
          *stride);
  return buffer;
}

// Rows of fp32 to where they belong in a result.
template <class Out>
FK_INLINE void write_set(const SetRows& set, const float* from, int64_t ldf, int64_t n, Out* out, int64_t stride,
                         int64_t column, int64_t first, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i)
    copy_row(from + i * ldf, n, n, out + SetRows::token(set, first + i) * stride + column);
}
FK_INLINE void write_set(const SetRows& set, const float* from, int64_t ldf, int64_t n, void* out, fk_dtype dtype,
                         int64_t stride, int64_t column, int64_t first, int64_t rows) {
  if (dtype == FK_F32)
    write_set(set, from, ldf, n, (float*)out, stride, column, first, rows);
  else
    write_set(set, from, ldf, n, (bf16*)out, stride, column, first, rows);
}

// One head of one set.
template <class A>
FK_INLINE void attention_backward_set(const struct fk_attention_backward& p, int64_t set, int64_t h, float* bias_sums,
                                      bool accumulate, const AttentionBackwardScratch<A>& s) {
  const int64_t d = p.channels / p.heads, dv = p.value_channels / p.heads, block = s.block;
  const SetRows of_keys = SetRows::of(p, set, p.keys), of_queries = SetRows::of(p, set, p.queries);
  int64_t ldk = s.ldk, ldr = s.ldr;
  const A* keys = set_rows(of_keys, p.k, p.k_stride, h * d, 0, p.keys, d, s.keys, &ldk);
  const A* values = set_rows(of_keys, p.v, p.v_stride, h * dv, 0, p.keys, dv, s.values, &ldr);
  if (p.dq) panels_of_rows(keys, ldk, p.keys, d, s.depth, s.key_panels);
  if (p.result) panels_of_rows(values, ldr, p.keys, dv, s.depth, s.value_panels);
  if (p.queries == 0) {
    clear(s.d_keys, p.keys * s.ldd);
    clear(s.d_values, p.keys * s.ldv);
  }
  for (int64_t r = 0; r < p.queries; r += block) {
    const int64_t queries = min64(block, p.queries - r), computed = round_up(queries, FK_VL);
    int64_t ldq = s.ldk, ldg = s.ldr;
    const A* query_rows = set_rows(of_queries, p.q, p.q_stride, h * d, r, queries, d, s.query_rows, &ldq);
    const A* grad_rows = set_rows(of_queries, p.grad, p.value_channels, h * dv, r, queries, dv, s.grad_rows, &ldg);
    lay_across(query_rows, ldq, queries, d, s.queries);
    across(keys, ldk, p.keys, s.queries, queries, round_up(d, kStep<A>), s.scores, block);
    float scale = p.scale * 1.44269504f;
    if (p.bias || p.mask) {
      const auto add = p.bias ? p.mask ? add_bias<true, true> : add_bias<true, false> : add_bias<false, true>;
      for (int64_t c = 0; c < queries; c += kPanel)
        add(s.scores + c, p.keys, splat(scale), p.bias ? p.bias + h * p.keys * p.bias_stride + r + c : nullptr,
            p.bias_stride, p.mask ? p.mask + set % p.sets_per_image * p.keys : nullptr, block);
      scale = 1.0f;
    }
    softmax_columns(s.scores, block, p.keys, queries, scale);
    const A* probabilities = as_rows(s.scores, block, p.keys, computed, s.probability_rows);
    if (p.result) {
      int64_t stride = block;
      const A* columns = columns_of_rows(probabilities, p.keys, computed, &stride, s.columns);
      from_keys(columns, stride, queries, s.value_panels, p.keys, s.depth, dv, s.result, s.ldv);
      if (p.added)
        for (int64_t i = 0; i < queries; ++i)
          add_rows_into(s.result + i * s.ldv,
                        (const A*)p.added + SetRows::token(of_queries, r + i) * p.value_channels + h * dv, dv,
                        s.result + i * s.ldv);
      write_set(of_queries, s.result, s.ldv, dv, (A*)p.result, p.value_channels, h * dv, r, queries);
    }
    if (p.dv) {
      panels_of_rows(grad_rows, ldg, queries, dv, block, s.grad_panels);
      add_to_keys(probabilities, block, p.keys, queries, s.grad_panels, dv, s.d_values, s.ldv, r > 0);
    }
    if (!p.dq && !p.dk && !bias_sums) continue;
    lay_across(grad_rows, ldg, queries, dv, s.grads);
    across(values, ldr, p.keys, s.grads, queries, round_up(dv, kStep<A>), s.slopes, block);
    softmax_backward_columns(s.scores, s.slopes, block, p.keys, queries, p.scale,
                             bias_sums ? bias_sums + r * p.keys : nullptr, accumulate);
    const A* slopes = as_rows(s.slopes, block, p.keys, computed, s.slope_rows);
    if (p.dq) {
      int64_t stride = block;
      const A* columns = columns_of_rows(slopes, p.keys, computed, &stride, s.columns);
      from_keys(columns, stride, queries, s.key_panels, p.keys, s.depth, d, s.result, s.ldd);
      write_set(of_queries, s.result, s.ldd, d, p.dq, p.dq_dtype, p.dq_stride, h * d, r, queries);
    }
    if (p.dk) {
      panels_of_rows(query_rows, ldq, queries, d, block, s.query_panels);
      add_to_keys(slopes, block, p.keys, queries, s.query_panels, d, s.d_keys, s.ldd, r > 0);
    }
  }
  if (p.dk) write_set(of_keys, s.d_keys, s.ldd, d, p.dk, p.k.dtype, p.dk_stride, h * d, 0, p.keys);
  if (p.dv) write_set(of_keys, s.d_values, s.ldv, dv, p.dv, p.v.dtype, p.dv_stride, h * dv, 0, p.keys);
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
