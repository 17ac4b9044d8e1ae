// Attention of one head: a panel of queries against all keys of a set, for the operators that put it to use.
//
// Scores are computed transposed, keys down and queries across: S^T = K Q^T takes the key rows as they lie in the
// tensor, the softmax runs down the lanes without a horizontal step, and S^T is already the left operand of P V.
#pragma once

#include "moments.h"

namespace {

// Keys whose scores stay in L1 at a time; longer key sets carry maximum and sum from chunk to chunk.
constexpr int64_t kKeyChunk = 256;

// What attention of one head needs to know of its caller.
struct AttentionShape {
  int64_t keys, d, dv;
  float scale;
  int64_t bias_stride;
  const float* mask;  // [keys], added to the scores in units of log2; null: none
};

template <class A>
struct AttentionScratch {
  A* query_rows;  // [kPanel][ldk], like `keys`
  A* queries;     // one panel of one head: [d][kPanel] (bf16: pairs of d)
  float* scores;  // [chunk][kPanel]
  A* weights;     // bf16 only: [chunk / 2][kPanel][2]
  A* keys;        // [keys][ldk], only when the tensor's own rows cannot be read directly
  A* values;      // panels [value panels][keys][kPanel] (bf16: pairs of keys)
  float* head;    // [kPanel][ldv] one head's output of one panel
  int64_t ldk, ldv, depth, chunk;

  FK_INLINE AttentionScratch layout(const AttentionShape& p, char** base) {
    AttentionScratch s;
    const int64_t pair = kStep<A>, size = (int64_t)sizeof(A);
    s.depth = round_up(p.d, pair);
    s.ldk = s.depth + kRowPad;
    s.ldv = round_up(p.dv, kPanel);
    s.chunk = min64(kKeyChunk, round_up(p.keys, 2));
    char* at = *base;
    s.query_rows = (A*)at;
    at += round_up(kPanel * s.ldk * size, 64);
    s.queries = (A*)at;
    at += round_up(s.depth * kPanel * size, 64);
    s.scores = (float*)at;
    at += s.chunk * kPanel * 4;
    s.weights = (A*)at;
    at += size == 2 ? s.chunk * kPanel * size : 0;
    s.keys = (A*)at;
    at += round_up(p.keys * s.ldk * size, 64);
    s.values = (A*)at;
    at += round_up(round_up(p.keys, 2) * s.ldv * size, 64);
    s.head = (float*)at;
    at += kPanel * s.ldv * 4;
    *base = at;
    return s;
  }
};

FK_INLINE const float* as_float(const struct fk_array& x) { return (const float*)x.data; }
FK_INLINE const bf16* as_bf16(const struct fk_array& x) { return (const bf16*)x.data; }

// One head's slice [rows][d] of a row-major tensor, converted; zeros behind d.
template <class A>
FK_INLINE void stage(const struct fk_array& x, int64_t offset, int64_t stride, int64_t rows, int64_t d, int64_t padded,
                     A* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; ++i)
    if (x.dtype == FK_F32)
      copy_row(as_float(x) + offset + i * stride, d, padded, out + i * ldo);
    else
      copy_row(as_bf16(x) + offset + i * stride, d, padded, out + i * ldo);
}

// A head's rows inside the tensor where the product can read them as they are, else null.
FK_INLINE const float* direct_rows(const struct fk_array& x, int64_t offset, int64_t, int64_t, const float*) {
  return x.dtype == FK_F32 ? as_float(x) + offset : nullptr;
}
FK_INLINE const bf16* direct_rows(const struct fk_array& x, int64_t offset, int64_t stride, int64_t d, const bf16*) {
  return x.dtype == FK_BF16 && d % 2 == 0 && stride % 2 == 0 ? as_bf16(x) + offset : nullptr;
}

// A head's rows as an operand, staged in `buffer` when they cannot be read directly; `stride` says how far apart they
// are.
template <class A>
FK_INLINE const A* operand_rows(const struct fk_array& x, int64_t offset, int64_t channels, int64_t rows, int64_t d,
                                const AttentionScratch<A>& s, A* buffer, int64_t* stride) {
  const A* direct = direct_rows(x, offset, channels, d, buffer);
  if (direct) {
    *stride = channels;
    return direct;
  }
  stage(x, offset, channels, rows, d, s.depth, buffer, s.ldk);
  *stride = s.ldk;
  return buffer;
}

// Queries across: [d][kPanel]; bf16 pairs of d move as one word. Lanes past the last query are zero.
template <class A>
FK_INLINE void pack_queries(const struct fk_array& q, int64_t offset, int64_t row_stride, int64_t queries, int64_t d,
                            const AttentionScratch<A>& s) {
  int64_t stride;
  const A* rows = operand_rows(q, offset, row_stride, queries, d, s, s.query_rows, &stride);
  transpose((const uint32_t*)rows, stride / kStep<A>, queries, s.depth / kStep<A>, (uint32_t*)s.queries, kPanel,
            kPanel);
}

FK_INLINE void pack_values(const struct fk_array& v, int64_t offset, int64_t stride, int64_t keys, int64_t dv,
                           float* out) {
  for (int64_t n = 0; n < dv; n += kPanel)
    stage(v, offset + n, stride, keys, min64(kPanel, dv - n), kPanel, out + n * keys, kPanel);
}
FK_INLINE void pack_values(const struct fk_array& v, int64_t offset, int64_t stride, int64_t keys, int64_t dv,
                           bf16* out) {
  const int64_t depth = round_up(keys, 2);
  for (int64_t n = 0; n < dv; n += kPanel) {
    const int64_t width = min64(kPanel, dv - n);
    for (int64_t k = 0; k < depth; k += 2) {
      bf16 pair[2][kPanel] = {};
      for (int64_t i = 0; i < 2 && k + i < keys; ++i)
        stage(v, offset + (k + i) * stride + n, stride, 1, width, kPanel, pair[i], kPanel);
      vu* to = (vu*)(out + n * depth + k * kPanel);
      for (int j = 0; j < FK_NV; ++j)
        to[j] = __builtin_convertvector(*(const vh*)(pair[0] + j * FK_VL), vu) |
                __builtin_convertvector(*(const vh*)(pair[1] + j * FK_VL), vu) << 16;
    }
  }
}

FK_INLINE vf column_maximum(const float* scores, int64_t keys, vf scale, int64_t stride = kPanel) {
  vf m[4];
  for (int j = 0; j < 4; ++j) m[j] = load(scores) * scale;
  int64_t i = 0;
  for (; i + 4 <= keys; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) m[j] = vmax(load(scores + (i + j) * stride) * scale, m[j]);
  for (; i < keys; ++i) m[0] = vmax(load(scores + i * stride) * scale, m[0]);
  return vmax(vmax(m[0], m[1]), vmax(m[2], m[3]));
}

// exp2(scale * score - maximum) down one column of lanes, as the left operand of the product with the values; returns
// the sums per lane. fp32 weights replace the scores.
FK_INLINE vf exponentiate(float* scores, int64_t keys, vf scale, vf maximum, float*, int64_t stride = kPanel) {
  constexpr int kSums = 4;
  vf sums[kSums];
  for (int j = 0; j < kSums; ++j) sums[j] = splat(0.0f);
  int64_t i = 0;
  for (; i + kSums <= keys; i += kSums)
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) {
      float* at = scores + (i + j) * stride;
      const vf e = exp2v<false>(load(at) * scale - maximum);
      store(at, e);
      sums[j] += e;
    }
  for (; i < keys; ++i) {
    float* at = scores + i * stride;
    const vf e = exp2v<false>(load(at) * scale - maximum);
    store(at, e);
    sums[0] += e;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
#if FK_NATIVE_BF16
FK_INLINE vf exponentiate(float* scores, int64_t keys, vf scale, vf maximum, bf16* weights) {
  vf s0 = splat(0.0f), s1 = splat(0.0f);
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 2 <= keys; i += 2) {
    const vf a = exp2v<true>(load(scores + i * kPanel) * scale - maximum);
    const vf b = exp2v<true>(load(scores + (i + 1) * kPanel) * scale - maximum);
    *(vu*)(weights + i * kPanel) = pair_bf16(a, b);
    s0 += a;
    s1 += b;
  }
  if (i < keys) {
    const vf a = exp2v<true>(load(scores + i * kPanel) * scale - maximum);
    *(vu*)(weights + i * kPanel) = pair_bf16(a, splat(0.0f));
    s0 += a;
  }
  return s0 + s1;
}
#endif

// Where the weights of lanes [lane, kPanel) stand.
FK_INLINE float* weights_of(const AttentionScratch<float>& s, int64_t lane) { return s.scores + lane; }
FK_INLINE bf16* weights_of(const AttentionScratch<bf16>& s, int64_t lane) { return s.weights + 2 * lane; }

// Scores in units of log2 with bias ([keys][stride] like the scores themselves) and mask added. Every vector of a panel
// goes through the same instructions, so a query's result does not depend on where in a panel it stands: choices made
// inside the loop led to contracted multiply-adds for one vector and not for the next.
template <bool Bias, bool Mask>
FK_INLINE void add_bias(float* scores, int64_t keys, vf scale, const float* bias, int64_t stride, const float* mask,
                        int64_t score_stride) {
  for (int64_t i = 0; i < keys; ++i) {
    const vf m = splat(Mask ? mask[i] : 0.0f);
    for (int j = 0; j < kPanel; j += FK_VL) {
      float* at = scores + i * score_stride + j;
      store(at, load(at) * scale + (Bias ? load(bias + i * stride + j) + m : m));
    }
  }
}

// One head for one panel of queries: s.head[query][0, dv). `bias`: of this head and panel, or null.
template <class A>
static __attribute__((noinline)) void attend(const AttentionShape& p, const A* keys, int64_t key_stride,
                                             int64_t queries, int64_t dv, const float* bias,
                                             const AttentionScratch<A>& s) {
  vf scale = splat(p.scale * 1.44269504f);
  float maximum[kPanel] __attribute__((aligned(64))), total[kPanel] __attribute__((aligned(64)));
  for (int64_t first = 0; first < p.keys; first += kKeyChunk) {
    const int64_t n = min64(kKeyChunk, p.keys - first);
    const Panels<A> across = {s.queries, 0, 1, s.depth, nullptr};
    products(keys + first * key_stride, key_stride, n, across, s.scores, kPanel, 0, false, queries);
    if (bias || p.mask) {
      const auto add = bias ? p.mask ? add_bias<true, true> : add_bias<true, false> : add_bias<false, true>;
      add(s.scores, n, splat(p.scale * 1.44269504f), bias ? bias + first * p.bias_stride : nullptr, p.bias_stride,
          p.mask ? p.mask + first : nullptr, kPanel);
      scale = splat(1.0f);
    }
    for (int j = 0; j * FK_VL < queries; ++j) {
      float* column = s.scores + j * FK_VL;
      vf m = column_maximum(column, n, scale), before = m;
      if (first > 0) {
        before = load(maximum + j * FK_VL);
        m = vmax(m, before);
      }
      store(maximum + j * FK_VL, m);
      // Until a key is seen whose bias is finite the maximum is -inf, and -inf - -inf would be NaN.
      m = m == splat(-__builtin_inff()) ? splat(0.0f) : m;
      if (first > 0) {
        const vf shrink = exp2v<false>(before - m);
        store(total + j * FK_VL, load(total + j * FK_VL) * shrink);
        float factor[FK_VL];
        store(factor, shrink);
        for (int64_t q = 0; q < FK_VL; ++q)
          for (int64_t c = 0; c < dv; c += FK_VL) {
            float* at = s.head + (j * FK_VL + q) * s.ldv + c;
            store(at, load(at) * splat(factor[q]));
          }
      }
      const vf sums = exponentiate(column, n, scale, m, weights_of(s, j * FK_VL));
      store(total + j * FK_VL, first > 0 ? load(total + j * FK_VL) + sums : sums);
    }
    const int64_t depth = round_up(p.keys, kStep<A>), k = round_up(n, kStep<A>);
    const Panels<A> values = {s.values + first * kPanel, depth * kPanel, ceil_div(dv, kPanel), k, nullptr};
    products<true>(weights_of(s, 0), kPanel * kStep<A>, queries, values, s.head, s.ldv, kPanel, first > 0, dv);
  }
  for (int64_t q = 0; q < queries; ++q) {
    const vf inverse = splat(1.0f / total[q]);
    for (int64_t c = 0; c < dv; c += FK_VL) store(s.head + q * s.ldv + c, load(s.head + q * s.ldv + c) * inverse);
  }
}

// Heads side by side of one row as the result: a residual, conversion.
template <class A, class Residual, class Out>
FK_INLINE void write_row(const A* row, int64_t n, const Residual* residual, Out* out) {
  int64_t c = 0;
  for (; c + FK_VL <= n; c += FK_VL) {
    const vf y = load(row + c);
    store(out + c, residual ? y + load(residual + c) : y);
  }
  for (; c < n; ++c) from_float(out + c, to_float(row[c]) + (residual ? to_float(residual[c]) : 0.0f));
}

// Row `at` of the result, and of the residual.
template <class A>
FK_INLINE void write_row(const A* row, int64_t n, int64_t at, const struct fk_array& residual, void* out,
                         fk_dtype out_dtype) {
  const float* residual32 = residual.data && residual.dtype == FK_F32 ? as_float(residual) + at * n : nullptr;
  const bf16* residual16 = residual.data && residual.dtype == FK_BF16 ? as_bf16(residual) + at * n : nullptr;
  if (out_dtype == FK_BF16)
    write_row(row, n, residual16, (bf16*)out + at * n);
  else if (residual16)
    write_row(row, n, residual16, (float*)out + at * n);
  else
    write_row(row, n, residual32, (float*)out + at * n);
}

FK_INLINE fk_dtype dtype_of(const float*) { return FK_F32; }
FK_INLINE fk_dtype dtype_of(const bf16*) { return FK_BF16; }

}  // namespace
