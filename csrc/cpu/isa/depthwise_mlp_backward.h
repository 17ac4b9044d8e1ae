// Backward of an MLP with a depthwise convolution in its middle, for one stack of images and one chunk of hidden
// channels at a time. Bands of rows roll over the map: the hidden map runs ahead by the filter's reach, its gradient
// lags behind by as much, so what one stage leaves is still in the cache when the next one takes it, and nothing is
// computed twice. Small images lie below each other as one map, so that products have enough rows.
#pragma once

#include "depthwise_mlp_maps.h"

namespace {

// One row of the gradient that arrives, converted.
template <class A>
FK_INLINE void take_grad_row(const struct fk_depthwise_mlp_backward& p, int64_t offset, int64_t padded, A* out) {
  if (p.grad.dtype == FK_F32)
    copy_row((const float*)p.grad.data + offset, p.out, padded, out);
  else
    copy_row((const bf16*)p.grad.data + offset, p.out, padded, out);
}

template <class A>
FK_INLINE void clear_maps(const struct fk_depthwise_mlp_backward& p, const MlpMaps<A>& m, int64_t images) {
  clear_border(p, m.hidden, m.bordered, images);
  clear_border(p, m.filtered_grad, m.bordered, images);
}

template <class A>
FK_INLINE void prepare_stack(const struct fk_depthwise_mlp_backward& p, const MlpMaps<A>& m, int64_t first,
                             int64_t images) {
  const int64_t pixels = p.height * p.width, channels = round_up(p.channels, kPanel), out = round_up(p.out, kPanel);
  for (int64_t i = 0; i < images; ++i) {
    const int64_t image = first + i;
    const int64_t x = (image * (p.prefix + pixels) + p.prefix) * p.channels;
    const int64_t grad = (image * (p.grad_prefix + pixels) + p.grad_prefix) * p.out;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const int64_t row = i * pixels + pixel;
      any_norm_row(p.x, x + pixel * p.channels, p.channels, channels, p.norm, image, m.normed + row * m.lda);
      take_grad_row(p, grad + pixel * p.out, out, m.grad + row * m.ldg);
    }
  }
  fill_ready(p, m.normed_ready, images, hidden_band);
  fill_ready(p, m.grad_ready, images, front_band);
  if (p.wants_expand) fill_panels(p, m.normed_panels, images, back_band);
  if (p.wants_project) fill_panels(p, m.grad_panels, images, front_band);
  if (!p.chunk_maps) clear_maps(p, m, images);
}

// A value of the hidden map from what the first linear gave.
template <class A, fk_activation Activation>
FK_INLINE vf hidden_value(const MlpChunk<A>& c, const NormVectors& norm, vf v, int64_t dense) {
  constexpr bool kLow = sizeof(A) == 2;
  const bool after = c.p.norms_after_activation;
  vf slope, hat = splat(0.0f);
  if (norm.present && !after) {
    hat = normalized(norm, v);
    v = hat * norm.weight + norm.bias;
  }
  v = activate<kLow, Activation>(v, &slope);
  if (Activation != FK_NO_ACTIVATION) store(c.m.slope1 + dense, slope);
  if (norm.present && after) {
    hat = normalized(norm, v);
    v = hat * norm.weight + norm.bias;
  }
  if (c.m.hat1) store(c.m.hat1 + dense, hat);
  return v;
}

// Rows of the hidden map.
template <class A, fk_activation Activation>
static __attribute__((noinline)) void expand_rows(const MlpChunk<A>& c, int64_t band) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const MlpMaps<A>& m = c.m;
  const int64_t line = mlp_line(p), reach = p.kernel / 2;
  const int64_t first = c.column / kPanel, last = first + ceil_div(c.channels, kPanel);
  const BlockRange rows = hidden_band(p, c.rows, band);
  const int64_t from = rows.first;
  product(
      m.normed + from * p.width * m.lda, m.lda, (rows.last - from) * p.width, p.expand, first, last,
      [&](int64_t row, int64_t height, int64_t n, const float* tile) {
        for (int j = 0; j < FK_NV; ++j) {
          const int64_t at = n + j * FK_VL, plane = (at - c.column) / FK_VL;
          if (at - c.column >= c.channels) continue;  // padding
          const vf bias = load(p.expand.bias + at);
          const NormVectors norm = norm_vectors(p.norm1, at);
          const int64_t pixel = from * p.width + row;
          int64_t dense = plane * m.dense + pixel * FK_VL, y = pixel / p.width, x = pixel % p.width;
          float* to = m.hidden + plane * m.bordered + (mlp_top(p, y) + reach) * line + (x + reach) * FK_VL;
          for (int64_t i = 0; i < height; ++i, dense += FK_VL, to += FK_VL) {
            store(to, hidden_value<A, Activation>(c, norm, load(tile + i * kPanel + j * FK_VL) + bias, dense));
            if (++x < p.width) continue;
            x = 0;
            to += (mlp_top(p, y + 1) - mlp_top(p, y)) * line - p.width * FK_VL;
            ++y;
          }
        }
      },
      INT64_MAX, last - first, MlpReady<A>::of(m.normed_ready, band));
}

// The same from what the forward kept.
template <class A, fk_activation Activation>
static __attribute__((noinline)) void take_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const MlpMaps<A>& m = c.m;
  const int64_t line = mlp_line(p), reach = p.kernel / 2;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    const NormVectors norm = norm_vectors(p.norm1, c.column + at);
    const int64_t plane = at / FK_VL;
    for (int64_t y = from; y < to; ++y) {
      const Kept kept = kept_row(p, c.image, c.column + at, y);
      float* out = m.hidden + plane * m.bordered + (mlp_top(p, y) + reach) * line + reach * FK_VL;
      const int64_t dense = plane * m.dense + y * p.width * FK_VL;
      for (int64_t i = 0; i < p.width * FK_VL; i += FK_VL)
        store(out + i, hidden_value<A, Activation>(c, norm, kept.at(i), dense + i));
    }
  }
}

// The pixel that the dense map of the second linear's input gradient begins with: of a band, where nobody keeps it.
template <class A>
FK_INLINE int64_t middle_origin(const MlpChunk<A>& c, int64_t from) {
  return c.p.adds_hidden ? 0 : from * c.p.width;
}

// Rows of the gradient of the second linear's input.
template <class A>
static __attribute__((noinline)) void project_back_rows(const MlpChunk<A>& c, int64_t band) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const BlockRange front = front_band(p, c.rows, band);
  const int64_t from = front.first;
  const int64_t first = c.column / kPanel, last = first + ceil_div(c.channels, kPanel);
  const A* rows = c.m.grad + from * p.width * c.m.ldg;
  float* out = c.m.middle_grad + (from * p.width - middle_origin(c, from)) * FK_VL;
  product(
      rows, c.m.ldg, (front.last - from) * p.width, p.project_back, first, last,
      [&](int64_t row, int64_t height, int64_t n, const float* tile) {
        for (int j = 0; j < FK_NV; ++j) {
          float* to = out + ((n - c.column) / FK_VL + j) * c.m.middle + row * FK_VL;
          for (int64_t i = 0; i < height; ++i) store(to + i * FK_VL, load(tile + i * kPanel + j * FK_VL));
        }
      },
      INT64_MAX, last - first, MlpReady<A>::of(c.m.grad_ready, band));
}

// Sums over pixels of the gradient behind a norm, alone and times the normalised value, and of this and its square.
struct NormSums {
  ExactSum grads, grads_x, hats, squares;

  // Those of a few neighbours.
  FK_INLINE void gather(vf (&few)[4], vf grad, vf hat) {
    few[0] += grad;
    few[1] += grad * hat;
    few[2] += hat;
    few[3] += hat * hat;
  }
  inline __attribute__((always_inline)) void add(const vf (&few)[4]) {
    grads.add(few[0]);
    grads_x.add(few[1]);
    hats.add(few[2]);
    squares.add(few[3]);
  }
};
// `kind`: of the first of the four; the others follow it.
template <class A>
FK_INLINE void add_sums(const MlpChunk<A>& c, int64_t kind, int64_t channel, const NormSums& sums, bool begins) {
  add_sums(c, kind, channel, sums.grads, begins);
  add_sums(c, kind + 1, channel, sums.grads_x, begins);
  add_sums(c, kind + 2, channel, sums.hats, begins);
  add_sums(c, kind + 3, channel, sums.squares, begins);
}

struct MiddleVectors {
  vf filter_bias;
  NormVectors norm;
  NormSums sums;
};

template <int Pixels, int Kernel, fk_activation Activation, class A>
FK_INLINE void middle_pixels(const MlpChunk<A>& c, int64_t from, int64_t y, int64_t x, int64_t at, MiddleVectors* v) {
  constexpr bool kLow = sizeof(A) == 2;
  const struct fk_depthwise_mlp_backward& p = c.p;
  constexpr int64_t step = FK_VL;
  const int64_t line = mlp_line(p), taps_step = round_up(p.expand.n, kPanel), reach = p.kernel / 2;
  const int64_t plane = at / FK_VL, corner = plane * c.m.bordered + mlp_top(p, y) * line + x * step;
  const float* hidden = c.m.hidden + corner;
  vf sums[Pixels];
  filter_sums<Pixels, Kernel>(hidden, line, step, p.filter + c.column + at, taps_step, v->filter_bias, p.kernel, sums);
  const float* centre = hidden + reach * (line + step);
  float* filtered = c.m.filtered_grad + corner + reach * (line + step);
  const int64_t pixel = y * p.width + x, dense = plane * c.m.dense + pixel * step;
  const float* grads = c.m.middle_grad + plane * c.m.middle + (pixel - middle_origin(c, from)) * step;
  float* middle = c.b.middle + (pixel - from * p.width) * c.b.stride + at;
  const bool steps = p.stores, after = p.norms_after_activation;
  vf few[4] = {};
#pragma GCC unroll 8
  for (int i = 0; i < Pixels; ++i) {
    vf z = sums[i], hat = splat(0.0f);
    if (p.adds_input) z += load(centre + i * step);
    if (v->norm.present && !after) {
      hat = normalized(v->norm, z);
      z = hat * v->norm.weight + v->norm.bias;
    }
    vf slope, out = activate<kLow, Activation>(z, &slope), grad = load(grads + i * step);
    if (v->norm.present && after) {
      hat = normalized(v->norm, out);
      out = hat * v->norm.weight + v->norm.bias;
    }
    if (p.adds_hidden) out += load(centre + i * step);
    store(middle + i * c.b.stride, out);
    if (!after) grad *= slope;
    if (v->norm.present) {
      NormSums::gather(few, grad, hat);
      if (!steps) grad = norm_input_grad(v->norm, grad, hat);
    }
    if (steps) {
      if (v->norm.present) store(c.m.hat2 + dense + i * step, hat);
      if (after) store(c.m.slope2 + dense + i * step, slope);
    } else if (after) {
      grad *= slope;
    }
    store(filtered + i * step, grad);
  }
  if (v->norm.present) v->sums.add(few);
}

// Rows [from, to) of the second linear's input, and of the gradient of what the filter gives; in several steps of the
// gradient behind the norm there, which `finish_norm2` turns into that.
template <class A, int Kernel, fk_activation Activation>
static __attribute__((noinline)) void middle_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    MiddleVectors v = {load(p.filter_bias + c.column + at), norm_vectors(p.norm2, c.column + at), {}};
    for (int64_t y = from; y < to; ++y) {
      int64_t x = 0;
      for (; x + 7 <= p.width; x += 7) middle_pixels<7, Kernel, Activation>(c, from, y, x, at, &v);
      for (; x + 2 <= p.width; x += 2) middle_pixels<2, Kernel, Activation>(c, from, y, x, at, &v);
      for (; x < p.width; ++x) middle_pixels<1, Kernel, Activation>(c, from, y, x, at, &v);
    }
    if (v.norm.present) add_sums(c, FK_SUM_NORM2, at, v.sums, c.first_stack && from == 0);
  }
}

// The gradient in front of the second norm, and of the activation in front of that, in place for rows [from, to).
template <class A>
static __attribute__((noinline)) void finish_norm2(const MlpChunk<A>& c, int64_t from, int64_t to_row) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t line = mlp_line(p), reach = p.kernel / 2;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    const NormVectors norm = norm_vectors(p.norm2, c.column + at);
    const int64_t plane = at / FK_VL;
    for (int64_t y = from; y < to_row; ++y) {
      float* to = c.m.filtered_grad + plane * c.m.bordered + (mlp_top(p, y) + reach) * line + reach * FK_VL;
      int64_t dense = plane * c.m.dense + y * p.width * FK_VL;
      for (int64_t x = 0; x < p.width; ++x, to += FK_VL, dense += FK_VL) {
        vf grad = load(to);
        if (norm.present) grad = norm_input_grad(norm, grad, load(c.m.hat2 + dense));
        if (p.norms_after_activation) grad *= load(c.m.slope2 + dense);
        store(to, grad);
      }
    }
  }
}

// Sums of the filter's gradient over rows [from, to): of each tap, and of the gradient itself.
template <class A, int Kernel>
static __attribute__((noinline)) void filter_grad_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  constexpr int64_t step = FK_VL;
  const int64_t line = mlp_line(p), reach = Kernel / 2;
  constexpr int kRows = Kernel == 3 ? 3 : 1;  // rows of taps at a time
  for (int64_t at = 0; at < c.channels; at += FK_VL)
    for (int ky = 0; ky < Kernel; ky += kRows) {
      vf totals[kRows][Kernel], total = splat(0.0f);
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < Kernel; ++i) totals[r][i] = splat(0.0f);
      for (int64_t y = from; y < to; ++y) {
        vf taps[kRows][Kernel], alone = splat(0.0f);
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < Kernel; ++i) taps[r][i] = splat(0.0f);
        const int64_t corner = at / FK_VL * c.m.bordered + mlp_top(p, y) * line;
        const float* grad = c.m.filtered_grad + corner + reach * (line + step);
        const float* hidden = c.m.hidden + corner + ky * line;
        for (int64_t x = 0; x < p.width; ++x, grad += step, hidden += step) {
          const vf g = load(grad);
          alone += g;
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int i = 0; i < Kernel; ++i) taps[r][i] += g * load(hidden + r * line + i * step);
        }
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < Kernel; ++i) totals[r][i] += taps[r][i];
        total += alone;
      }
      const bool begins = c.first_stack && from == 0;
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < Kernel; ++i) add_sums(c, FK_SUM_TAPS + (ky + r) * Kernel + i, at, totals[r][i], begins);
      if (ky == 0) add_sums(c, FK_SUM_FILTERED, at, total, begins);
    }
}

struct BackVectors {
  NormVectors norm;
  NormSums sums;
  vf expanded;
};

// What the first norm scaled, at a row and a plane of the chunk.
template <class A>
struct FirstHats {
  const NormVectors& norm;
  const float* hats;
  Kept kept;

  FK_INLINE FirstHats of(const MlpChunk<A>& c, const NormVectors& norm, int64_t at, int64_t y) {
    const int64_t dense = at / FK_VL * c.m.dense + y * c.p.width * FK_VL;
    if (!norm.present) return {norm, nullptr, {}};
    if (c.m.hat1) return {norm, c.m.hat1 + dense, {}};
    return {norm, nullptr, kept_row(c.p, c.image, c.column + at, y)};
  }
  inline __attribute__((always_inline)) vf at(int64_t x) const {
    return hats ? load(hats + x * FK_VL) : normalized(norm, kept.at(x * FK_VL));
  }
};

// The gradient of the hidden map at `Pixels` pixels, and what becomes of it in front of the hidden activation.
template <int Pixels, int Kernel, class A>
FK_INLINE void back_pixels(const MlpChunk<A>& c, int64_t from, int64_t y, int64_t x, int64_t at, BackVectors* v) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  constexpr int64_t step = FK_VL;
  const int64_t line = mlp_line(p), taps_step = round_up(p.expand.n, kPanel), plane = at / FK_VL;
  const float* corner = c.m.filtered_grad + plane * c.m.bordered + mlp_top(p, y) * line + x * step;
  vf sums[Pixels];
  filter_sums<Pixels, Kernel>(corner, line, step, p.flipped + c.column + at, taps_step, splat(0.0f), p.kernel, sums);
  const float* centre = corner + p.kernel / 2 * (line + step);
  const bool steps = p.stores, after = p.norms_after_activation;
  const FirstHats<A> hats = FirstHats<A>::of(c, v->norm, at, y);
  vf few[4] = {};
#pragma GCC unroll 8
  for (int i = 0; i < Pixels; ++i) {
    const int64_t pixel = y * p.width + x + i, dense = plane * c.m.dense + pixel * step;
    vf grad = sums[i];
    if (p.adds_input) grad += load(centre + i * step);
    if (p.adds_hidden) grad += load(c.m.middle_grad + dense);
    const bool sloped = p.hidden_activation != FK_NO_ACTIVATION;
    if (sloped && !after) grad *= load(c.m.slope1 + dense);
    if (v->norm.present) {
      const vf hat = hats.at(x + i);
      NormSums::gather(few, grad, hat);
      if (!steps) grad = norm_input_grad(v->norm, grad, hat);
    }
    if (steps) {
      store(c.m.hidden_grad + dense, grad);
      continue;
    }
    if (sloped && after) grad *= load(c.m.slope1 + dense);
    v->expanded += grad;
    store(c.b.grad + (pixel - from * p.width) * c.b.stride + at, grad);
  }
  if (v->norm.present) v->sums.add(few);
}

template <class A, int Kernel>
static __attribute__((noinline)) void back_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const bool begins = c.first_stack && from == 0;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    BackVectors v = {norm_vectors(p.norm1, c.column + at), {}, splat(0.0f)};
    vf expanded = splat(0.0f);
    for (int64_t y = from; y < to; ++y) {
      v.expanded = splat(0.0f);
      int64_t x = 0;
      for (; x + 7 <= p.width; x += 7) back_pixels<7, Kernel>(c, from, y, x, at, &v);
      for (; x + 2 <= p.width; x += 2) back_pixels<2, Kernel>(c, from, y, x, at, &v);
      for (; x < p.width; ++x) back_pixels<1, Kernel>(c, from, y, x, at, &v);
      expanded += v.expanded;
    }
    if (v.norm.present) add_sums(c, FK_SUM_NORM1, at, v.sums, begins);
    if (!p.stores) add_sums(c, FK_SUM_EXPANDED, at, expanded, begins);
  }
}

// The last step's share of `back_rows`, when the first norm's sums over the batch are known.
template <class A>
static __attribute__((noinline)) void finish_norm1(const MlpChunk<A>& c, int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    const NormVectors norm = norm_vectors(p.norm1, c.column + at);
    const bool sloped = p.norms_after_activation && p.hidden_activation != FK_NO_ACTIVATION;
    vf expanded = splat(0.0f);
    for (int64_t y = from; y < to; ++y) {
      const FirstHats<A> hats = FirstHats<A>::of(c, norm, at, y);
      vf of_row = splat(0.0f);
      for (int64_t x = 0; x < p.width; ++x) {
        const int64_t pixel = y * p.width + x, dense = at / FK_VL * c.m.dense + pixel * FK_VL;
        vf grad = load(c.m.hidden_grad + dense);
        if (norm.present) grad = norm_input_grad(norm, grad, hats.at(x));
        if (sloped) grad *= load(c.m.slope1 + dense);
        of_row += grad;
        store(c.b.grad + (pixel - from * p.width) * c.b.stride + at, grad);
      }
      expanded += of_row;
    }
    add_sums(c, FK_SUM_EXPANDED, at, expanded, c.first_stack && from == 0);
  }
}

// sums[channel][n] += rows[pixel][channel] * panels[pixel][n] over a band's rows of the map.
template <class A>
FK_INLINE void sum_over_pixels(const MlpChunk<A>& c, const float* rows, const MlpPanels<A>& panels, float* sums,
                               int64_t band, BlockRange of) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t pixels = (of.last - of.first) * p.width, padded = panels.panels * kPanel;
  const A* operand;
  int64_t stride = c.b.stride;
#if FK_NATIVE_BF16
  if constexpr (sizeof(A) == 2) {
    stride *= 2;
    for (int64_t i = 0; i < pixels; i += 2)
      for (int64_t at = 0; at < c.channels; at += FK_VL) {
        const vf high = i + 1 < pixels ? load(rows + (i + 1) * c.b.stride + at) : splat(0.0f);
        *(vu*)(c.b.pairs + i / 2 * stride + 2 * at) = pair_bf16(load(rows + i * c.b.stride + at), high);
      }
    operand = c.b.pairs;
  }
#endif
  if constexpr (sizeof(A) == 4) operand = rows;
  float* to_sums = sums + (c.group * p.rows + c.column - p.first) * padded;
  const Panels<A> w = MlpPanels<A>::of(panels, band, of.first * p.width, pixels);
  products<true>(operand, stride, min64(c.channels, p.first + p.rows - c.column), w, to_sums, padded, kPanel,
                 !c.first_stack || of.first > 0);
}

// Gradients of the first linear: of its weight, and of its input.
template <class A>
static __attribute__((noinline)) void expand_grad_rows(const MlpChunk<A>& c, int64_t band) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const BlockRange back = back_band(p, c.rows, band);
  if (p.wants_expand) sum_over_pixels(c, c.b.grad, c.m.normed_panels, p.expand_sums, band, back);
  if (!p.wants_input) return;
  const int64_t pixels = (back.last - back.first) * p.width, padded = round_up(p.channels, kPanel);
  const A* rows;
#if FK_NATIVE_BF16
  if constexpr (sizeof(A) == 2) {
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t at = 0; at < c.channels; at += FK_VL)
        store(c.b.rows + i * c.b.stride + at, load(c.b.grad + i * c.b.stride + at));
    rows = c.b.rows;
  }
#endif
  if constexpr (sizeof(A) == 4) rows = c.b.grad;
  float* out = p.normed_grad + ((c.slice * p.batch + c.image) * p.height * p.width + back.first * p.width) * padded;
  const Panels<A> w = panels_of<A>(p.expand_back, 0, padded / kPanel, c.column, c.channels);
  products(rows, c.b.stride, pixels, w, out, padded, kPanel, !c.first_chunk);
}

template <class A, int Kernel>
FK_INLINE void front_rows(const MlpChunk<A>& c, int64_t band) {
  const BlockRange front = front_band(c.p, c.rows, band);
  project_back_rows(c, band);
  with_activation(c.p.activation,
                  [&](auto activation) { middle_rows<A, Kernel, activation.value>(c, front.first, front.last); });
  if (c.p.wants_project) sum_over_pixels(c, c.b.middle, c.m.grad_panels, c.p.project_sums, band, front);
}

template <class A>
FK_INLINE void expand_rows(const MlpChunk<A>& c, int64_t band) {
  const BlockRange rows = hidden_band(c.p, c.rows, band);
  if (rows.first >= rows.last) return;
  with_activation(c.p.hidden_activation, [&](auto activation) {
    if (c.p.kept)
      take_rows<A, activation.value>(c, rows.first, rows.last);
    else
      expand_rows<A, activation.value>(c, band);
  });
}

// Everything about a chunk in one go.
template <class A, int Kernel>
FK_INLINE void whole_chunk(const MlpChunk<A>& c) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  for (int64_t band = 0; band < band_count(p, c.rows); ++band) {
    const BlockRange front = front_band(p, c.rows, band), back = back_band(p, c.rows, band);
    expand_rows(c, band);
    if (front.first < front.last) {
      front_rows<A, Kernel>(c, band);
      if (p.wants_filter) filter_grad_rows<A, Kernel>(c, front.first, front.last);
    }
    if (!p.wants_hidden) continue;
    back_rows<A, Kernel>(c, back.first, back.last);
    expand_grad_rows(c, band);
  }
}

// What comes before the second norm's sums, between them and the first one's, and behind those.
template <class A, int Kernel>
FK_INLINE void chunk_step(const MlpChunk<A>& c, int64_t step) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t reach = p.kernel / 2;
  int64_t finished = 0;
  for (int64_t band = 0; band < band_count(p, c.rows); ++band) {
    const BlockRange back = back_band(p, c.rows, band);
    const int64_t from = back.first, to = back.last;
    if (step == 0) {
      expand_rows(c, band);
      front_rows<A, Kernel>(c, band);
    } else if (step == 1) {
      const int64_t next = min64(c.rows, to + reach);
      if (p.norm2.mean || p.norms_after_activation) finish_norm2(c, finished, next);
      finished = next;
      if (p.wants_filter) filter_grad_rows<A, Kernel>(c, from, to);
      if (p.wants_hidden) back_rows<A, Kernel>(c, from, to);
    } else if (p.wants_hidden) {
      finish_norm1(c, from, to);
      expand_grad_rows(c, band);
    }
  }
}

template <class A>
FK_INLINE void run_chunk(const MlpChunk<A>& c, int64_t step) {
  with_kernel(c.p.kernel, [&](auto kernel) {
    constexpr int kKernel = decltype(kernel)::value;
    if constexpr (kKernel != 0) {
      if (c.p.stores)
        chunk_step<A, kKernel>(c, step);
      else
        whole_chunk<A, kKernel>(c);
    }
  });
}

// The images that a group has, whole stacks but for the last one.
FK_INLINE BlockRange images_of_group(const struct fk_depthwise_mlp_backward& p, int64_t group) {
  const int64_t share = ceil_div(ceil_div(p.batch, p.stack), p.groups) * p.stack;
  return BlockRange{group * share, min64((group + 1) * share, p.batch)};
}

// Hidden channels from `column` on to `end` that there are, in whole vectors.
FK_INLINE int64_t present(const struct fk_depthwise_mlp_backward& p, int64_t end, int64_t column) {
  return round_up(min64(end, p.expand.n) - column, FK_VL);
}

template <class A>
FK_INLINE void backward_task(const struct fk_depthwise_mlp_backward& p, int64_t task, void* scratch) {
  const int64_t group = task / p.slices, slice = task % p.slices;
  const int64_t hidden = round_up(p.expand.n, kPanel);
  const int64_t share = round_up(ceil_div(hidden, p.slices), p.chunk);
  const int64_t begin = slice * share, end = min64(begin + share, hidden);
  const MlpMaps<A> m = mlp_maps<A>(p, scratch);
  const MlpBandBuffers<A> b = mlp_band_buffers<A>(p, (char*)scratch + m.bytes);
  const BlockRange images = images_of_group(p, group);
  for (int64_t image = images.first; image < images.last; image += p.stack) {
    const int64_t count = min64(p.stack, images.last - image);
    prepare_stack(p, m, image, count);
    for (int64_t column = begin; column < end; column += p.chunk)
      run_chunk(MlpChunk<A>{p, m, b, image, count * p.height, group, slice, column,
                            present(p, min64(end, column + p.chunk), column), image == images.first, column == begin},
                0);
  }
}

// One of the steps around batch statistics, for a group's stacks: 0 prepares them, the others do a chunk's work.
template <class A>
FK_INLINE void backward_step(const struct fk_depthwise_mlp_backward& p, int64_t step, int64_t group, void* scratch) {
  const BlockRange images = images_of_group(p, group);
  const MlpBandBuffers<A> b = mlp_band_buffers<A>(p, scratch);
  for (int64_t image = images.first; image < images.last; image += p.stack) {
    const MlpMaps<A> m = mlp_maps<A>(p, p.stores[image / p.stack]);
    const int64_t count = min64(p.stack, images.last - image);
    if (step == 0) {
      prepare_stack(p, m, image, count);
      continue;
    }
    // A chunk with maps of its own has an input gradient of its own, too.
    if (p.chunk_maps && step == 1) clear_maps(p, m, count);
    const int64_t slice = p.chunk_maps ? p.first / p.chunk : 0, channels = present(p, p.first + p.chunk, p.first);
    run_chunk(MlpChunk<A>{p, m, b, image, count * p.height, group, slice, p.first, channels, image == images.first,
                          p.chunk_maps || p.first == 0},
              step - 1);
  }
}

int64_t store_depthwise_mlp_backward(const struct fk_depthwise_mlp_backward* p) {
  return max64(mlp_maps<float>(*p, nullptr).bytes, mlp_maps<bf16>(*p, nullptr).bytes);
}

int64_t chunk_maps_depthwise_mlp_backward(const struct fk_depthwise_mlp_backward* p) {
  return max64(mlp_maps<float>(*p, nullptr).chunk_bytes, mlp_maps<bf16>(*p, nullptr).chunk_bytes);
}

int64_t scratch_depthwise_mlp_backward(const struct fk_depthwise_mlp_backward* p) {
  return (p->stores ? 0 : store_depthwise_mlp_backward(p)) + mlp_band_buffers<float>(*p, nullptr).bytes +
         mlp_band_buffers<bf16>(*p, nullptr).bytes;
}

void depthwise_mlp_backward(const struct fk_depthwise_mlp_backward* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->expand.low_precision) return backward_task<bf16>(*p, task, scratch);
#endif
  backward_task<float>(*p, task, scratch);
}

void depthwise_mlp_backward_step(const struct fk_depthwise_mlp_backward* p, int64_t step, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->expand.low_precision) return backward_step<bf16>(*p, step, task, scratch);
#endif
  backward_step<float>(*p, step, task, scratch);
}

}  // namespace
