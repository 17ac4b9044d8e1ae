// Backward of an MLP with a depthwise convolution in its middle, for one stack of images and one chunk of hidden
// channels at a time. Bands of rows roll over the map: the hidden map runs ahead by the filter's reach, its gradient
// lags behind by as much, so what one stage leaves is still in the cache when the next one takes it, and nothing is
// computed twice. Small images lie below each other as one map, so that products have enough rows.
#pragma once

#include "backward.h"
#include "channel_norm.h"
#include "depthwise_mlp.h"

namespace {

// What there is of a stack. Maps of a chunk lie in planes of FK_VL channels: with a border of zeros as wide as the
// filter reaches around every image, which neighbours share, or dense.
template <class A>
struct MlpMaps {
  A *normed, *normed_panels;      // [H * W][lda]: normalised x; the same as panels of a product that sums over pixels
  A *grad, *grad_panels;          // [H * W][ldg]: gradient of the second linear's result
  float *hidden, *filtered_grad;  // bordered: the filter's input, the gradient of its result
  float *slope1, *hat1;           // dense: derivative of the hidden activation, what the first batch norm scales
  float *slope2, *hat2;           // the same behind the filter
  float* middle_grad;             // dense: gradient of the second linear's input
  float* hidden_grad;             // dense, between steps only
  int64_t lda, ldg, bytes;
  int64_t depth;                    // pixels that the panels have room for
  int64_t bordered, dense, middle;  // values of a plane: with a border, without, of `middle_grad`
};

// What a band needs besides.
template <class A>
struct MlpBandBuffers {
  float* middle;  // [pixels][stride]: the second linear's input
  float* grad;    // [pixels][stride]: gradient of the first linear's result
  A* pairs;       // either of them in pairs of pixels
  A* rows;        // the latter in the products' dtype
  int64_t stride, bytes;
};

template <class T>
FK_INLINE T* take(char** at, int64_t values) {
  T* taken = (T*)*at;
  *at += round_up(values * (int64_t)sizeof(T), 64);
  return taken;
}

// How far a stage that must keep ahead is ahead, in rows: even, so that bands begin with even pixels.
FK_INLINE int64_t mlp_lead(const struct fk_depthwise_mlp_backward& p) { return round_up(p.kernel / 2, 2); }
FK_INLINE int64_t mlp_band_pixels(const struct fk_depthwise_mlp_backward& p) {
  return min64(p.rows_per_band + mlp_lead(p), p.stack * p.height) * p.width;
}
FK_INLINE int64_t mlp_line(const struct fk_depthwise_mlp_backward& p) { return (p.width + p.kernel / 2 * 2) * FK_VL; }
// Where a row of a stack is in a bordered map: the first of the rows that the filter reaches from it.
FK_INLINE int64_t mlp_top(const struct fk_depthwise_mlp_backward& p, int64_t y) {
  return y + y / p.height * (p.kernel / 2);
}

template <class A>
FK_INLINE MlpMaps<A> mlp_maps(const struct fk_depthwise_mlp_backward& p, void* base) {
  MlpMaps<A> m = {};
  char* at = (char*)base;
  const int64_t pixels = p.stack * p.height * p.width, reach = p.kernel / 2;
  const int64_t channels = round_up(p.channels, kPanel), out = round_up(p.out, kPanel), planes = p.chunk / FK_VL;
  const bool steps = p.store;
  m.depth = round_up(pixels, kStep<A>);
  m.bordered = (p.stack * (p.height + reach) + reach) * mlp_line(p);
  m.dense = pixels * FK_VL;
  m.middle = steps || p.adds_hidden ? m.dense : mlp_band_pixels(p) * FK_VL;
  const int64_t bordered = planes * m.bordered, dense = planes * m.dense;
  m.lda = channels + kRowPad;
  m.ldg = out + kRowPad;
  m.normed = take<A>(&at, pixels * m.lda);
  m.grad = take<A>(&at, pixels * m.ldg);
  m.normed_panels = take<A>(&at, p.wants_expand ? m.depth * channels : 0);
  m.grad_panels = take<A>(&at, p.wants_project ? m.depth * out : 0);
  m.hidden = take<float>(&at, bordered);
  m.filtered_grad = take<float>(&at, bordered);
  m.slope1 = take<float>(&at, p.hidden_activation == FK_NO_ACTIVATION ? 0 : dense);
  m.hat1 = take<float>(&at, p.norm1.mean ? dense : 0);
  m.slope2 = take<float>(&at, steps && p.norms_after_activation ? dense : 0);
  m.hat2 = take<float>(&at, steps && p.norm2.mean ? dense : 0);
  m.middle_grad = take<float>(&at, planes * m.middle);
  m.hidden_grad = take<float>(&at, steps ? dense : 0);
  m.bytes = at - (char*)base;
  return m;
}

template <class A>
FK_INLINE MlpBandBuffers<A> mlp_band_buffers(const struct fk_depthwise_mlp_backward& p, void* base) {
  MlpBandBuffers<A> b;
  char* at = (char*)base;
  const int64_t pixels = round_up(mlp_band_pixels(p), 2);
  b.stride = p.chunk + kRowPad;
  b.middle = take<float>(&at, pixels * b.stride);
  b.grad = take<float>(&at, pixels * b.stride);
  b.pairs = take<A>(&at, sizeof(A) == 2 ? pixels * b.stride : 0);
  b.rows = take<A>(&at, sizeof(A) == 2 ? pixels * b.stride : 0);
  b.bytes = at - (char*)base;
  return b;
}

template <class A>
struct MlpChunk {
  const struct fk_depthwise_mlp_backward& p;
  const MlpMaps<A>& m;
  const MlpBandBuffers<A>& b;
  int64_t image, rows;  // the stack's first image, and rows of all of them
  int64_t group, slice;
  int64_t column, channels;  // hidden channels: where they begin and how many, with padding
  bool first_stack, first_chunk;
};

template <int Kernel>
struct mlp_kernel {
  static constexpr int value = Kernel;
};

// A sum with what rounding took from it: gradients through batch statistics cancel.
struct ExactSum {
  vf total = splat(0.0f), lost = splat(0.0f);
  inline __attribute__((always_inline)) void add(vf x) {
    const vf sum = total + x, taken = sum - total;
    lost += (total - (sum - taken)) + (x - taken);
    total = sum;
  }
};

// Adds a vector of sums to those of its channels; a group's first stack begins them, at its first row.
template <class A>
FK_INLINE void add_sums(const MlpChunk<A>& c, int64_t kind, int64_t channel, vf value, bool begins) {
  float lanes[FK_VL] __attribute__((aligned(64)));
  store(lanes, value);
  const int64_t kinds = FK_SUM_TAPS + c.p.kernel * c.p.kernel;
  double* to = c.p.sums + (c.group * kinds + kind) * c.p.rows + c.column - c.p.first + channel;
  for (int i = 0; i < FK_VL; ++i) to[i] = (begins ? 0.0 : to[i]) + (double)lanes[i];
}
template <class A>
FK_INLINE void add_sums(const MlpChunk<A>& c, int64_t kind, int64_t channel, const ExactSum& sum, bool begins) {
  add_sums(c, kind, channel, sum.total, begins);
  add_sums(c, kind, channel, sum.lost, false);
}

// The border of a map of `images` images.
FK_INLINE void clear_border(const struct fk_depthwise_mlp_backward& p, float* map, int64_t plane, int64_t images) {
  const int64_t reach = p.kernel / 2, line = mlp_line(p), side = reach * FK_VL, period = p.height + reach;
  for (int64_t at = 0; at < p.chunk; at += FK_VL, map += plane)
    for (int64_t r = 0; r < images * period + reach; ++r) {
      float* row = map + r * line;
      if (r % period < reach) {
        clear(row, line);
      } else {
        clear(row, side);
        clear(row + line - side, side);
      }
    }
}

// One row of the gradient that arrives, converted.
template <class A>
FK_INLINE void take_grad_row(const struct fk_depthwise_mlp_backward& p, int64_t offset, int64_t padded, A* out) {
  if (p.grad.dtype == FK_F32)
    copy_row((const float*)p.grad.data + offset, p.out, padded, out);
  else
    copy_row((const bf16*)p.grad.data + offset, p.out, padded, out);
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
  if (p.wants_expand) panels_of_rows(m.normed, m.lda, images * pixels, channels, m.depth, m.normed_panels);
  if (p.wants_project) panels_of_rows(m.grad, m.ldg, images * pixels, out, m.depth, m.grad_panels);
  clear_border(p, m.hidden, m.bordered, images);
  clear_border(p, m.filtered_grad, m.bordered, images);
}

// Rows [from, to) of the hidden map.
template <class A, fk_activation Activation>
static __attribute__((noinline)) void expand_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  constexpr bool kLow = sizeof(A) == 2;
  const struct fk_depthwise_mlp_backward& p = c.p;
  const MlpMaps<A>& m = c.m;
  const int64_t line = mlp_line(p), reach = p.kernel / 2, depth = round_up(p.channels, kStep<A>);
  const int64_t first = c.column / kPanel, last = first + c.channels / kPanel;
  const A* panels = (const A*)p.expand.panels;
  const bool after = p.norms_after_activation;
  product(m.normed + from * p.width * m.lda, m.lda, (to - from) * p.width, panels, p.channels, first, last,
          panels + first * depth * kPanel, [&](int64_t row, int64_t height, int64_t n, const float* tile) {
            for (int j = 0; j < FK_NV; ++j) {
              const int64_t at = n + j * FK_VL, plane = (at - c.column) / FK_VL;
              const vf bias = load(p.expand.bias + at);
              const NormVectors norm = norm_vectors(p.norm1, at);
              const int64_t pixel = from * p.width + row;
              int64_t dense = plane * m.dense + pixel * FK_VL, y = pixel / p.width, x = pixel % p.width;
              float* to = m.hidden + plane * m.bordered + (mlp_top(p, y) + reach) * line + (x + reach) * FK_VL;
              for (int64_t i = 0; i < height; ++i, dense += FK_VL, to += FK_VL) {
                vf v = load(tile + i * kPanel + j * FK_VL) + bias;
                if (norm.present && !after) {
                  v = normalized(norm, v);
                  store(m.hat1 + dense, v);
                  v = v * norm.weight + norm.bias;
                }
                vf slope;
                v = activate<kLow, Activation>(v, &slope);
                if (Activation != FK_NO_ACTIVATION) store(m.slope1 + dense, slope);
                if (norm.present && after) {
                  v = normalized(norm, v);
                  store(m.hat1 + dense, v);
                  v = v * norm.weight + norm.bias;
                }
                store(to, v);
                if (++x < p.width) continue;
                x = 0;
                to += (mlp_top(p, y + 1) - mlp_top(p, y)) * line - p.width * FK_VL;
                ++y;
              }
            }
          });
}

// The pixel that the dense map of the second linear's input gradient begins with: of a band, where nobody keeps it.
template <class A>
FK_INLINE int64_t middle_origin(const MlpChunk<A>& c, int64_t from) {
  return c.p.store || c.p.adds_hidden ? 0 : from * c.p.width;
}

// Rows [from, to) of the gradient of the second linear's input.
template <class A>
static __attribute__((noinline)) void project_back_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t depth = round_up(p.out, kStep<A>), pixels = (to - from) * p.width;
  const A* panels = (const A*)p.project_back.panels + c.column * depth;
  const A* rows = c.m.grad + from * p.width * c.m.ldg;
  float* out = c.m.middle_grad + (from * p.width - middle_origin(c, from)) * FK_VL;
  product(rows, c.m.ldg, pixels, panels, p.out, 0, c.channels / kPanel, panels,
          [&](int64_t row, int64_t height, int64_t n, const float* tile) {
            for (int j = 0; j < FK_NV; ++j) {
              float* to = out + (n / FK_VL + j) * c.m.middle + row * FK_VL;
              for (int64_t i = 0; i < height; ++i) store(to + i * FK_VL, load(tile + i * kPanel + j * FK_VL));
            }
          });
}

struct MiddleVectors {
  vf filter_bias;
  NormVectors norm;
  // Sums of the gradient behind the norm, alone and times the normalised value, and of this and its square.
  ExactSum grads, grads_x, hats, squares;
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
  const bool steps = p.store, after = p.norms_after_activation;
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
      v->grads.add(grad);
      v->grads_x.add(grad * hat);
      v->hats.add(hat);
      v->squares.add(hat * hat);
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
}

// Rows [from, to) of the second linear's input, and of the gradient of what the filter gives; in several steps of the
// gradient behind the norm there, which `finish_norm2` turns into that.
template <class A, int Kernel, fk_activation Activation>
static __attribute__((noinline)) void middle_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    MiddleVectors v = {load(p.filter_bias + c.column + at), norm_vectors(p.norm2, c.column + at), {}, {}, {}, {}};
    for (int64_t y = from; y < to; ++y) {
      int64_t x = 0;
      for (; x + 7 <= p.width; x += 7) middle_pixels<7, Kernel, Activation>(c, from, y, x, at, &v);
      for (; x + 2 <= p.width; x += 2) middle_pixels<2, Kernel, Activation>(c, from, y, x, at, &v);
      for (; x < p.width; ++x) middle_pixels<1, Kernel, Activation>(c, from, y, x, at, &v);
    }
    if (!v.norm.present) continue;
    add_sums(c, FK_SUM_NORM2, at, v.grads, c.first_stack && from == 0);
    add_sums(c, FK_SUM_NORM2_X, at, v.grads_x, c.first_stack && from == 0);
    add_sums(c, FK_SUM_NORM2_HAT, at, v.hats, c.first_stack && from == 0);
    add_sums(c, FK_SUM_NORM2_SQUARE, at, v.squares, c.first_stack && from == 0);
  }
}

// The gradient in front of the second norm, and of the activation in front of that, in place.
template <class A>
static __attribute__((noinline)) void finish_norm2(const MlpChunk<A>& c) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t line = mlp_line(p), reach = p.kernel / 2;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    const NormVectors norm = norm_vectors(p.norm2, c.column + at);
    const int64_t plane = at / FK_VL;
    for (int64_t y = 0; y < c.rows; ++y) {
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
  ExactSum grads, grads_x, hats, squares;
  vf expanded;
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
  const bool steps = p.store, after = p.norms_after_activation;
#pragma GCC unroll 8
  for (int i = 0; i < Pixels; ++i) {
    const int64_t pixel = y * p.width + x + i, dense = plane * c.m.dense + pixel * step;
    vf grad = sums[i];
    if (p.adds_input) grad += load(centre + i * step);
    if (p.adds_hidden) grad += load(c.m.middle_grad + dense);
    const bool sloped = p.hidden_activation != FK_NO_ACTIVATION;
    if (sloped && !after) grad *= load(c.m.slope1 + dense);
    if (v->norm.present) {
      const vf hat = load(c.m.hat1 + dense);
      v->grads.add(grad);
      v->grads_x.add(grad * hat);
      v->hats.add(hat);
      v->squares.add(hat * hat);
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
}

template <class A, int Kernel>
static __attribute__((noinline)) void back_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const bool begins = c.first_stack && from == 0;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    BackVectors v = {norm_vectors(p.norm1, c.column + at), {}, {}, {}, {}, splat(0.0f)};
    vf expanded = splat(0.0f);
    for (int64_t y = from; y < to; ++y) {
      v.expanded = splat(0.0f);
      int64_t x = 0;
      for (; x + 7 <= p.width; x += 7) back_pixels<7, Kernel>(c, from, y, x, at, &v);
      for (; x + 2 <= p.width; x += 2) back_pixels<2, Kernel>(c, from, y, x, at, &v);
      for (; x < p.width; ++x) back_pixels<1, Kernel>(c, from, y, x, at, &v);
      expanded += v.expanded;
    }
    if (v.norm.present) {
      add_sums(c, FK_SUM_NORM1, at, v.grads, begins);
      add_sums(c, FK_SUM_NORM1_X, at, v.grads_x, begins);
      add_sums(c, FK_SUM_NORM1_HAT, at, v.hats, begins);
      add_sums(c, FK_SUM_NORM1_SQUARE, at, v.squares, begins);
    }
    if (!p.store) add_sums(c, FK_SUM_EXPANDED, at, expanded, begins);
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
      vf of_row = splat(0.0f);
      for (int64_t pixel = y * p.width; pixel < (y + 1) * p.width; ++pixel) {
        const int64_t dense = at / FK_VL * c.m.dense + pixel * FK_VL;
        vf grad = load(c.m.hidden_grad + dense);
        if (norm.present) grad = norm_input_grad(norm, grad, load(c.m.hat1 + dense));
        if (sloped) grad *= load(c.m.slope1 + dense);
        of_row += grad;
        store(c.b.grad + (pixel - from * p.width) * c.b.stride + at, grad);
      }
      expanded += of_row;
    }
    add_sums(c, FK_SUM_EXPANDED, at, expanded, c.first_stack && from == 0);
  }
}

// sums[channel][n] += rows[pixel][channel] * panels[pixel][n] over rows [from, to) of the map.
template <class A>
FK_INLINE void sum_over_pixels(const MlpChunk<A>& c, const float* rows, const A* panels, int64_t columns, float* sums,
                               int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t begin = from * p.width, pixels = (to - from) * p.width, even = round_up(pixels, kStep<A>);
  const int64_t depth = c.m.depth, padded = round_up(columns, kPanel);
  const A* operand;
  int64_t stride = c.b.stride;
#if FK_NATIVE_BF16
  if constexpr (sizeof(A) == 2) {
    stride *= 2;
    for (int64_t i = 0; i < even; i += 2)
      for (int64_t at = 0; at < c.channels; at += FK_VL) {
        const vf high = i + 1 < pixels ? load(rows + (i + 1) * c.b.stride + at) : splat(0.0f);
        *(vu*)(c.b.pairs + i / 2 * stride + 2 * at) = pair_bf16(load(rows + i * c.b.stride + at), high);
      }
    operand = c.b.pairs;
  }
#endif
  if constexpr (sizeof(A) == 4) operand = rows;
  float* to_sums = sums + (c.group * p.rows + c.column - p.first) * padded;
  const RowTiles tiles = row_tiles(min64(c.channels, p.first + p.rows - c.column));
  for (int64_t n = 0; n < padded / kPanel; ++n) {
    const A* panel = panels + (n * depth + begin) * kPanel;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t channel = tile_start(tiles, t);
      tile<true>(tile_height(tiles, t), operand + channel * kStep<A>, stride, panel, even,
                 to_sums + channel * padded + n * kPanel, padded, !c.first_stack || from > 0, fetch_nothing(panel));
    }
  }
}

// Gradients of the first linear: of its weight, and of its input.
template <class A>
static __attribute__((noinline)) void expand_grad_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  if (p.wants_expand) sum_over_pixels(c, c.b.grad, c.m.normed_panels, p.channels, p.expand_sums, from, to);
  if (!p.wants_input) return;
  const int64_t pixels = (to - from) * p.width, padded = round_up(p.channels, kPanel);
  const int64_t depth = round_up(p.expand_back.k, kStep<A>), k = min64(c.channels, depth - c.column);
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
  float* out = p.normed_grad + ((c.slice * p.batch + c.image) * p.height * p.width + from * p.width) * padded;
  const RowTiles tiles = row_tiles(pixels);
  for (int64_t n = 0; n < padded / kPanel; ++n) {
    const A* panel = (const A*)p.expand_back.panels + (n * depth + c.column) * kPanel;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = tile_start(tiles, t);
      tile(tile_height(tiles, t), rows + row * c.b.stride, c.b.stride, panel, k, out + row * padded + n * kPanel,
           padded, !c.first_chunk, fetch_nothing(panel));
    }
  }
}

template <class A, int Kernel>
FK_INLINE void front_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  project_back_rows(c, from, to);
  with_activation(c.p.activation, [&](auto activation) { middle_rows<A, Kernel, activation.value>(c, from, to); });
  if (c.p.wants_project) sum_over_pixels(c, c.b.middle, c.m.grad_panels, c.p.out, c.p.project_sums, from, to);
}

template <class A>
FK_INLINE void expand_rows(const MlpChunk<A>& c, int64_t from, int64_t to) {
  if (from < to)
    with_activation(c.p.hidden_activation, [&](auto activation) { expand_rows<A, activation.value>(c, from, to); });
}

// Everything about a chunk in one go.
template <class A, int Kernel>
FK_INLINE void whole_chunk(const MlpChunk<A>& c) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t lead = mlp_lead(p), reach = p.kernel / 2;
  int64_t expanded = 0, middle = 0;
  for (int64_t from = 0, to; from < c.rows; from = to) {
    to = min64(c.rows, from + p.rows_per_band);
    const int64_t next_middle = min64(c.rows, to + lead), next_expanded = min64(c.rows, next_middle + reach);
    expand_rows(c, expanded, next_expanded);
    expanded = next_expanded;
    if (middle < next_middle) {
      front_rows<A, Kernel>(c, middle, next_middle);
      if (p.wants_filter) filter_grad_rows<A, Kernel>(c, middle, next_middle);
      middle = next_middle;
    }
    if (!p.wants_hidden) continue;
    back_rows<A, Kernel>(c, from, to);
    expand_grad_rows(c, from, to);
  }
}

// What comes before the second norm's sums, between them and the first one's, and behind those.
template <class A, int Kernel>
FK_INLINE void chunk_step(const MlpChunk<A>& c, int64_t step) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t reach = p.kernel / 2;
  int64_t expanded = 0;
  if (step == 1) finish_norm2(c);
  for (int64_t from = 0, to; from < c.rows; from = to) {
    to = min64(c.rows, from + p.rows_per_band);
    if (step == 0) {
      const int64_t next = min64(c.rows, to + reach);
      expand_rows(c, expanded, next);
      expanded = next;
      front_rows<A, Kernel>(c, from, to);
    } else if (step == 1) {
      if (p.wants_filter) filter_grad_rows<A, Kernel>(c, from, to);
      if (p.wants_hidden) back_rows<A, Kernel>(c, from, to);
    } else if (p.wants_hidden) {
      finish_norm1(c, from, to);
      expand_grad_rows(c, from, to);
    }
  }
}

// Calls `body` with a compile-time filter size; 0 stands for any other.
template <class Body>
FK_INLINE void with_kernel(int64_t kernel, Body body) {
  switch (kernel) {
    case 1:
      return body(mlp_kernel<1>());
    case 3:
      return body(mlp_kernel<3>());
    case 5:
      return body(mlp_kernel<5>());
    case 7:
      return body(mlp_kernel<7>());
    default:
      return body(mlp_kernel<0>());
  }
}

template <class A>
FK_INLINE void run_chunk(const MlpChunk<A>& c, int64_t step) {
  with_kernel(c.p.kernel, [&](auto kernel) {
    constexpr int kKernel = decltype(kernel)::value;
    if constexpr (kKernel != 0) {
      if (c.p.store)
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
      run_chunk(MlpChunk<A>{p, m, b, image, count * p.height, group, slice, column, min64(p.chunk, end - column),
                            image == images.first, column == begin},
                0);
  }
}

// One of the steps around batch statistics, for a group's stacks: 0 prepares them, the others do a chunk's work.
template <class A>
FK_INLINE void backward_step(const struct fk_depthwise_mlp_backward& p, int64_t step, int64_t group, void* scratch) {
  const int64_t hidden = round_up(p.expand.n, kPanel);
  const BlockRange images = images_of_group(p, group);
  const MlpBandBuffers<A> b = mlp_band_buffers<A>(p, scratch);
  for (int64_t image = images.first; image < images.last; image += p.stack) {
    const MlpMaps<A> m = mlp_maps<A>(p, p.store + image / p.stack * p.store_bytes);
    const int64_t count = min64(p.stack, images.last - image);
    if (step == 0)
      prepare_stack(p, m, image, count);
    else
      run_chunk(MlpChunk<A>{p, m, b, image, count * p.height, group, 0, p.first, min64(p.chunk, hidden - p.first),
                            image == images.first, p.first == 0},
                step - 1);
  }
}

// Statistics take stacks of one image. Per channel of its bordered map: the sum over pixels, and the sum of squares
// around the image's own mean.
FK_INLINE void map_moments(const struct fk_depthwise_mlp_backward& p, const float* map, int64_t plane, int64_t channels,
                           double* sums, double* squares) {
  const int64_t line = mlp_line(p), reach = p.kernel / 2;
  for (int64_t at = 0; at < channels; at += FK_VL) {
    const float* first = map + at / FK_VL * plane + reach * (line + FK_VL);
    vf total = splat(0.0f);
    for (int64_t y = 0; y < p.height; ++y) {
      vf of_row = splat(0.0f);
      for (int64_t x = 0; x < p.width; ++x) of_row += load(first + y * line + x * FK_VL);
      total += of_row;
    }
    const vf mean = total / splat((float)(p.height * p.width));
    vf rest = splat(0.0f);
    ExactSum square;
    for (int64_t y = 0; y < p.height; ++y) {
      vf rest_of_row = splat(0.0f);
      for (int64_t x = 0; x < p.width; ++x) {
        const vf d = load(first + y * line + x * FK_VL) - mean;
        square.add(d * d);
        rest_of_row += d;
      }
      rest += rest_of_row;
    }
    float lanes[4][FK_VL] __attribute__((aligned(64)));
    store(lanes[0], mean);
    store(lanes[1], rest);
    store(lanes[2], square.total);
    store(lanes[3], square.lost);
    const double n = (double)(p.height * p.width);
    for (int i = 0; i < FK_VL; ++i) {
      // What rounding left out of the mean.
      sums[at + i] = n * (double)lanes[0][i] + (double)lanes[1][i];
      const double square_sum = (double)lanes[2][i] + (double)lanes[3][i];
      squares[at + i] = square_sum - (double)lanes[1][i] * (double)lanes[1][i] / n;
    }
  }
}

// What the first norm meets, into the hidden map.
template <class A, fk_activation Activation>
static __attribute__((noinline)) void expand_unnormed(const MlpChunk<A>& c) {
  constexpr bool kLow = sizeof(A) == 2;
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t line = mlp_line(p), reach = p.kernel / 2, depth = round_up(p.channels, kStep<A>);
  const int64_t first = c.column / kPanel;
  const A* panels = (const A*)p.expand.panels;
  product(c.m.normed, c.m.lda, p.height * p.width, panels, p.channels, first, first + c.channels / kPanel,
          panels + first * depth * kPanel, [&](int64_t row, int64_t height, int64_t n, const float* tile) {
            int64_t y = row / p.width, x = row % p.width;
            for (int64_t i = 0; i < height; ++i) {
              for (int j = 0; j < FK_NV; ++j) {
                const vf v = load(tile + i * kPanel + j * FK_VL) + load(p.expand.bias + n + j * FK_VL);
                store(
                    c.m.hidden + ((n - c.column) / FK_VL + j) * c.m.bordered + (y + reach) * line + (x + reach) * FK_VL,
                    activate<kLow, Activation>(v));
              }
              if (++x == p.width) {
                x = 0;
                ++y;
              }
            }
          });
}

// The first norm, and the activation behind it, in place.
template <class A, fk_activation Activation>
static __attribute__((noinline)) void norm_hidden(const MlpChunk<A>& c) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t line = mlp_line(p), reach = p.kernel / 2;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    const NormVectors norm = norm_vectors(p.norm1, c.column + at);
    for (int64_t y = 0; y < p.height; ++y)
      for (int64_t x = 0; x < p.width; ++x) {
        float* to = c.m.hidden + at / FK_VL * c.m.bordered + (y + reach) * line + (x + reach) * FK_VL;
        vf v = load(to);
        if (norm.present) v = normalized(norm, v) * norm.weight + norm.bias;
        store(to, activate<sizeof(A) == 2, Activation>(v));
      }
  }
}

// What the second norm meets, into the map of the filter's results.
template <class A, int Kernel, fk_activation Activation>
static __attribute__((noinline)) void filter_unnormed(const MlpChunk<A>& c) {
  constexpr bool kLow = sizeof(A) == 2;
  const struct fk_depthwise_mlp_backward& p = c.p;
  constexpr int64_t step = FK_VL;
  const int64_t line = mlp_line(p), reach = p.kernel / 2, taps_step = round_up(p.expand.n, kPanel);
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    const int64_t plane = at / FK_VL * c.m.bordered;
    const vf bias = load(p.filter_bias + c.column + at);
    for (int64_t y = 0; y < p.height; ++y) {
      const float *from = c.m.hidden + plane + y * line, *filter = p.filter + c.column + at;
      const float* centre = from + reach * (line + step);
      float* to = c.m.filtered_grad + plane + (y + reach) * line + reach * step;
      int64_t x = 0;
      for (; x + 7 <= p.width; x += 7) {
        vf sums[7];
        filter_sums<7, Kernel>(from + x * step, line, step, filter, taps_step, bias, p.kernel, sums);
        for (int i = 0; i < 7; ++i) {
          if (p.adds_input) sums[i] += load(centre + (x + i) * step);
          store(to + (x + i) * step, activate<kLow, Activation>(sums[i]));
        }
      }
      for (; x < p.width; ++x) {
        vf sum;
        filter_sums<1, Kernel>(from + x * step, line, step, filter, taps_step, bias, p.kernel, &sum);
        if (p.adds_input) sum += load(centre + x * step);
        store(to + x * step, activate<kLow, Activation>(sum));
      }
    }
  }
}

// Batch statistics: step 0 prepares the images; for a chunk, step 1 has what the first norm meets, step 2 the second.
template <class A>
FK_INLINE void statistics_step(const struct fk_depthwise_mlp_backward& p, int64_t step, int64_t image) {
  const MlpMaps<A> m = mlp_maps<A>(p, p.store + image * p.store_bytes);
  const int64_t pixels = p.height * p.width;
  if (step == 0) {
    const int64_t x = (image * (p.prefix + pixels) + p.prefix) * p.channels;
    for (int64_t i = 0; i < pixels; ++i)
      any_norm_row(p.x, x + i * p.channels, p.channels, round_up(p.channels, kPanel), p.norm, image,
                   m.normed + i * m.lda);
    clear_border(p, m.hidden, m.bordered, 1);
    return;
  }
  const MlpBandBuffers<A> none = {};
  const MlpChunk<A> c = {
      p,     m,    none, image, p.height, image, 0, p.first, min64(p.chunk, round_up(p.expand.n, kPanel) - p.first),
      false, false};
  double* sums = p.sums + image * 2 * p.chunk;
  const bool after = p.norms_after_activation;
  if (step == 1) {
    with_activation(after ? p.hidden_activation : FK_NO_ACTIVATION,
                    [&](auto activation) { expand_unnormed<A, activation.value>(c); });
    return map_moments(p, m.hidden, m.bordered, c.channels, sums, sums + p.chunk);
  }
  with_activation(after ? FK_NO_ACTIVATION : p.hidden_activation,
                  [&](auto activation) { norm_hidden<A, activation.value>(c); });
  with_activation(after ? p.activation : FK_NO_ACTIVATION, [&](auto activation) {
    with_kernel(p.kernel,
                [&](auto kernel) { filter_unnormed<A, decltype(kernel)::value, decltype(activation)::value>(c); });
  });
  map_moments(p, m.filtered_grad, m.bordered, c.channels, sums, sums + p.chunk);
}

void depthwise_mlp_statistics(const struct fk_depthwise_mlp_backward* p, int64_t step, int64_t image) {
#if FK_NATIVE_BF16
  if (p->expand.low_precision) return statistics_step<bf16>(*p, step, image);
#endif
  statistics_step<float>(*p, step, image);
}

int64_t store_depthwise_mlp_backward(const struct fk_depthwise_mlp_backward* p) {
  return mlp_maps<float>(*p, nullptr).bytes;
}

int64_t scratch_depthwise_mlp_backward(const struct fk_depthwise_mlp_backward* p) {
  return (p->store ? 0 : mlp_maps<float>(*p, nullptr).bytes) + mlp_band_buffers<float>(*p, nullptr).bytes +
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
