// An MLP with a depthwise convolution in its middle, for a band of rows of one image. The hidden map is walked in
// chunks of channels: expanded (with the halo that the filter needs), convolved, activated and summed into the
// projection, so that no more than a chunk of it exists, in the cache.
#pragma once

#include "activations.h"
#include "moments.h"

namespace {

// The band of output rows of a task, and the input rows it needs: those of the map within the filter's reach.
struct MlpBand {
  int64_t image, slice, first, rows;
  int64_t top, in_rows;  // first input row, and how many
  int64_t reach;
};
FK_INLINE MlpBand mlp_band(const struct fk_depthwise_mlp& p, int64_t task) {
  MlpBand b;
  b.reach = p.kernel / 2;
  b.slice = task % p.slices;
  task /= p.slices;
  b.image = task / p.tasks_per_image;
  b.first = task % p.tasks_per_image * p.rows_per_task;
  b.rows = min64(p.rows_per_task, p.height - b.first);
  b.top = max64(0, b.first - b.reach);
  b.in_rows = min64(p.height, b.first + b.rows + b.reach) - b.top;
  return b;
}

template <class A>
struct DepthwiseScratch {
  A* normed;       // [in_rows * width][lda]
  float* hidden;   // [chunk / FK_VL] planes of [rows + 2 reach][width + 2 reach][FK_VL], zero outside the map
  A* activated;    // [rows * width][ldh]
  float* sums;     // [rows * width][lds]; slices have theirs in p.partial
  char* prepared;  // of normed
  int64_t lda, ldh, lds, line, plane, bytes;

  FK_INLINE DepthwiseScratch layout(const struct fk_depthwise_mlp& p, void* base) {
    DepthwiseScratch s;
    const int64_t reach = p.kernel / 2, pixels = min64(p.rows_per_task, p.height) * p.width;
    const int64_t in_pixels = min64(p.rows_per_task + 2 * reach, p.height) * p.width;
    s.line = (p.width + 2 * reach) * FK_VL;
    s.plane = (min64(p.rows_per_task, p.height) + 2 * reach) * s.line + kRowPad;
    s.lda = round_up(p.channels, 2) + kRowPad;
    s.ldh = p.chunk + kRowPad;
    s.lds = p.sums_stride;
    char* at = (char*)base;
    s.normed = (A*)at;
    at += round_up(in_pixels * s.lda * (int64_t)sizeof(A), 64);
    s.hidden = (float*)at;
    at += p.chunk / FK_VL * s.plane * 4;
    s.activated = (A*)at;
    at += round_up(pixels * s.ldh * (int64_t)sizeof(A), 64);
    s.sums = (float*)at;
    at += p.slices > 1 ? 0 : round_up(pixels * s.lds * 4, 64);
    s.prepared = at;
    at += prepared_bytes<A>(in_pixels, p.channels);
    s.bytes = at - (char*)base;
    return s;
  }
};

// Zeros around the part of the map that a task expands; the expansion never writes there.
template <class A>
FK_INLINE void clear_border(const struct fk_depthwise_mlp& p, const MlpBand& b, const DepthwiseScratch<A>& s) {
  const int64_t side = b.reach * FK_VL;
  for (int64_t c = 0; c < p.chunk / FK_VL; ++c)
    for (int64_t r = 0; r < b.rows + 2 * b.reach; ++r) {
      float* row = s.hidden + c * s.plane + r * s.line;
      const int64_t y = b.first - b.reach + r;
      const bool outside = y < 0 || y >= p.height;
      for (int64_t i = 0; i < (outside ? s.line : side); i += FK_VL) store(row + i, splat(0.0f));
      for (int64_t i = s.line - side; i < s.line; i += FK_VL) store(row + i, splat(0.0f));
    }
}

// A finished tile of the expansion: bias, activation, affine, into the hidden map. `pixel` counts from the band's top.
template <class A, fk_activation Activation>
FK_INLINE void place_hidden(const struct fk_depthwise_mlp& p, const MlpBand& b, const DepthwiseScratch<A>& s,
                            const float* tile, int64_t pixel, int64_t height, int64_t column, int64_t chunk_column) {
  constexpr bool kLow = sizeof(A) == 2;
  int64_t y = pixel / p.width, x = pixel % p.width;
  const int64_t lead = b.top - (b.first - b.reach);  // rows of the halo that lie outside the map
  vf bias[FK_NV], scale[FK_NV], shift[FK_NV];
  for (int j = 0; j < FK_NV; ++j) {
    bias[j] = load(p.expand.bias + column + j * FK_VL);
    scale[j] = p.scale ? load(p.scale + column + j * FK_VL) : splat(1.0f);
    shift[j] = p.scale ? load(p.shift + column + j * FK_VL) : splat(0.0f);
  }
  for (int64_t i = 0; i < height; ++i) {
    float* to = s.hidden + chunk_column / FK_VL * s.plane + (y + lead) * s.line + (x + b.reach) * FK_VL;
    for (int j = 0; j < FK_NV; ++j) {
      vf h = activate<kLow, Activation>(load(tile + i * kPanel + j * FK_VL) + bias[j]);
      if (p.scale) h = h * scale[j] + shift[j];
      store(to + j * s.plane, h);
    }
    if (++x == p.width) {
      x = 0;
      ++y;
    }
  }
}

// The depthwise filter at `Pixels` neighbouring pixels, for one vector of channels.
template <int Pixels, int Kernel>
FK_INLINE void filter_sums(const float* hidden, int64_t line, int64_t step, const float* filter, int64_t taps_step,
                           vf bias, int64_t kernel, vf* sums) {
  const int64_t k = Kernel ? Kernel : kernel;
  for (int i = 0; i < Pixels; ++i) sums[i] = bias;
  for (int64_t ky = 0; ky < k; ++ky) {
    const float* row = hidden + ky * line;
    const float* weights = filter + ky * k * taps_step;
    if (Kernel == 3) {
      const vf w0 = load(weights), w1 = load(weights + taps_step), w2 = load(weights + 2 * taps_step);
      vf a = load(row), b = load(row + step);
#pragma GCC unroll 8
      for (int i = 0; i < Pixels; ++i) {
        const vf c = load(row + (i + 2) * step);
        sums[i] += a * w0;
        sums[i] += b * w1;
        sums[i] += c * w2;
        a = b;
        b = c;
      }
    } else {
      for (int64_t kx = 0; kx < k; ++kx) {
        const vf w = load(weights + kx * taps_step);
#pragma GCC unroll 8
        for (int i = 0; i < Pixels; ++i) sums[i] += w * load(row + (kx + i) * step);
      }
    }
  }
}

// The same with inner residual and activation behind it.
template <int Pixels, int Kernel, fk_activation Activation, bool AddsHidden, class A>
FK_INLINE void filter_pixels(const float* hidden, int64_t line, int64_t step, const float* filter, int64_t taps_step,
                             vf bias, int64_t kernel, A* out, int64_t ldo) {
  constexpr bool kLow = sizeof(A) == 2;
  vf sums[Pixels];
  filter_sums<Pixels, Kernel>(hidden, line, step, filter, taps_step, bias, kernel, sums);
  const float* centre = hidden + (Kernel ? Kernel : kernel) / 2 * (line + step);
#pragma GCC unroll 8
  for (int i = 0; i < Pixels; ++i) {
    vf u = sums[i];
    u = activate<kLow, Activation>(u);
    if (AddsHidden) u += load(centre + i * step);
    store(out + i * ldo, u);
  }
}

// Channels outside, rows inside: the lines that a row shares with the next one stay in L1.
template <int Kernel, fk_activation Activation, bool AddsHidden, class A>
static __attribute__((noinline)) void filter_band(const struct fk_depthwise_mlp& p, const MlpBand& b,
                                                  const DepthwiseScratch<A>& s, int64_t column, int64_t channels) {
  const int64_t taps_step = round_up(p.expand.n, kPanel), width = p.width, kernel = p.kernel, ldh = s.ldh;
  for (int64_t c = 0; c < channels; c += FK_VL) {
    const float* filter = p.filter + column + c;
    const vf bias = load(p.filter_bias + column + c);
    for (int64_t y = 0; y < b.rows; ++y) {
      const float* hidden = s.hidden + c / FK_VL * s.plane + y * s.line;
      A* out = s.activated + y * width * ldh + c;
      int64_t x = 0;
      for (; x + 7 <= width; x += 7)
        filter_pixels<7, Kernel, Activation, AddsHidden>(hidden + x * FK_VL, s.line, FK_VL, filter, taps_step, bias,
                                                         kernel, out + x * ldh, ldh);
      for (; x + 2 <= width; x += 2)
        filter_pixels<2, Kernel, Activation, AddsHidden>(hidden + x * FK_VL, s.line, FK_VL, filter, taps_step, bias,
                                                         kernel, out + x * ldh, ldh);
      for (; x < width; ++x)
        filter_pixels<1, Kernel, Activation, AddsHidden>(hidden + x * FK_VL, s.line, FK_VL, filter, taps_step, bias,
                                                         kernel, out + x * ldh, ldh);
    }
  }
}

template <fk_activation Activation, bool AddsHidden, class A>
FK_INLINE void filter_band(const struct fk_depthwise_mlp& p, const MlpBand& b, const DepthwiseScratch<A>& s,
                           int64_t column, int64_t channels) {
  if (p.kernel == 3)
    filter_band<3, Activation, AddsHidden>(p, b, s, column, channels);
  else
    filter_band<0, Activation, AddsHidden>(p, b, s, column, channels);
}

template <fk_activation Activation, class A>
FK_INLINE void filter_band(const struct fk_depthwise_mlp& p, const MlpBand& b, const DepthwiseScratch<A>& s,
                           int64_t column, int64_t channels) {
  if (p.adds_hidden)
    filter_band<Activation, true>(p, b, s, column, channels);
  else
    filter_band<Activation, false>(p, b, s, column, channels);
}

// Prefix rows skip the branch: what is left is the residual, `count` values from `first` on.
FK_INLINE void write_prefix(const struct fk_array& residual, void* out, fk_dtype out_dtype, int64_t first,
                            int64_t count) {
  for (int64_t at = first; at < first + count; ++at) {
    const float y = !residual.data             ? 0.0f
                    : residual.dtype == FK_F32 ? ((const float*)residual.data)[at]
                                               : to_float(((const bf16*)residual.data)[at]);
    if (out_dtype == FK_F32)
      ((float*)out)[at] = y;
    else
      from_float((bf16*)out + at, y);
  }
}

// The branch of `pixels` pixels of an image from `first` on, complete in `sums`: bias, residual, summary.
// `sum` is the number of the summary's share.
FK_INLINE void finish_pixels(const struct fk_depthwise_mlp& p, int64_t image, int64_t first, int64_t pixels,
                             const float* sums, int64_t sum) {
  const int64_t n = p.project.n, lds = p.sums_stride, map = p.height * p.width;
  if (p.means)
    for (int64_t c = 0; c < n; ++c) {
      double total = 0.0;
      for (int64_t i = 0; i < pixels; ++i) total += sums[i * lds + c];
      p.means[sum * n + c] = total + (double)pixels * p.project.bias[c];
    }
  const struct fk_array none = {nullptr, FK_F32, 0};
  const int64_t raw_start = image * map + first, out_start = image * (p.prefix + map) + p.prefix + first;
  for (int64_t c = 0; c < n; c += kPanel)
    if (p.raw)
      write_tile(sums + c, lds, pixels, raw_start, c, p.project, p.raw, FK_F32, none);
    else
      write_tile(sums + c, lds, pixels, out_start, c, p.project, p.out, p.out_dtype, p.residual);
  if (!p.moments) return;
  double* to = p.moments + 3 * sum;
  to[0] = to[1] = to[2] = 0.0;
  if (p.raw)
    add_rows(p.raw, FK_F32, raw_start * n, pixels, n, to);
  else
    add_rows(p.out, p.out_dtype, out_start * n, pixels, n, to);
}

// The second step behind slices: their sums added in order.
void depthwise_mlp_sum(const struct fk_depthwise_mlp* p, int64_t task) {
  const int64_t map = p->height * p->width, lds = p->sums_stride, image = task / p->sums_per_image;
  const int64_t first = task % p->sums_per_image * p->pixels_per_sum;
  const int64_t pixels = min64(p->pixels_per_sum, map - first);
  float* sums = p->partial + (image * map + first) * lds;
  for (int64_t slice = 1; slice < p->slices; ++slice) {
    const float* more = sums + slice * p->batch * map * lds;
    for (int64_t i = 0; i < pixels * lds; i += FK_VL) store(sums + i, load(sums + i) + load(more + i));
  }
  finish_pixels(*p, image, first, pixels, sums, task);
}

template <class A>
FK_INLINE void depthwise_task(const struct fk_depthwise_mlp& p, int64_t task, void* scratch) {
  const DepthwiseScratch<A> s = DepthwiseScratch<A>::layout(p, scratch);
  const MlpBand b = mlp_band(p, task);
  const int64_t tokens = p.prefix + p.height * p.width, start = b.image * tokens + p.prefix;
  if (b.first == 0 && b.slice == 0)
    write_prefix(p.residual, p.out, p.out_dtype, b.image * tokens * p.project.n, p.prefix * p.project.n);
  const int64_t in_pixels = b.in_rows * p.width, pixels = b.rows * p.width;
  for (int64_t i = 0; i < in_pixels; ++i)
    any_norm_row(p.x, (start + b.top * p.width + i) * p.channels, p.channels, round_up(p.channels, 2), p.norm, b.image,
                 s.normed + i * s.lda);
  clear_border(p, b, s);
  const int64_t depth = round_up(p.expand.k, kStep<A>);
  const int64_t hidden_panels = ceil_div(p.expand.n, kPanel), out_panels = ceil_div(p.project.n, kPanel);
  const int64_t chunk = p.chunk / kPanel;
  const int64_t share = ceil_div(hidden_panels, p.slices), begin = b.slice * share;
  const int64_t end = min64(begin + share, hidden_panels), first_pixel = b.first * p.width;
  float* sums =
      p.slices > 1 ? p.partial + ((b.slice * p.batch + b.image) * p.height * p.width + first_pixel) * s.lds : s.sums;
  const char* prepared = prepare(s.normed, s.lda, in_pixels, depth, end - begin, s.prepared);
  for (int64_t h = begin; h < end; h += chunk) {
    const int64_t h_end = min64(h + chunk, end), column = h * kPanel;
    // Hidden channels past the end meet no weights: the depth stops at the last real one.
    Panels<A> project = panels_of<A>(p.project, 0, out_panels, column, (h_end - h) * kPanel);
    project.after = (const A*)p.expand.panels + h_end % hidden_panels * depth * kPanel;
    with_activation(p.hidden_activation, [&](auto activation) {
      product(
          s.normed, s.lda, in_pixels, p.expand, h, h_end,
          [&](int64_t row, int64_t height, int64_t n, const float* tile) {
            place_hidden<A, activation.value>(p, b, s, tile, row, height, n, n - column);
          },
          INT64_MAX, 0, prepared, project.first);
    });
    with_activation(p.activation,
                    [&](auto activation) { filter_band<activation.value>(p, b, s, column, (h_end - h) * kPanel); });
    products(s.activated, s.ldh, pixels, project, sums, s.lds, kPanel, h > begin);
  }
  if (p.slices == 1) finish_pixels(p, b.image, first_pixel, pixels, sums, task);
}

int64_t scratch_depthwise_mlp(const struct fk_depthwise_mlp* p) {
  return DepthwiseScratch<float>::layout(*p, nullptr).bytes;
}

void depthwise_mlp(const struct fk_depthwise_mlp* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->expand.low_precision) return depthwise_task<bf16>(*p, task, scratch);
#endif
  depthwise_task<float>(*p, task, scratch);
}

// Calls `body` with the row at `at` of a residual, null where there is none, and of the result, in their dtypes.
template <class Body>
FK_INLINE void with_row(const struct fk_array& residual, void* out, fk_dtype out_dtype, int64_t at, Body body) {
  const float* residual32 = residual.data && residual.dtype == FK_F32 ? (const float*)residual.data + at : nullptr;
  const bf16* residual16 = residual.data && residual.dtype == FK_BF16 ? (const bf16*)residual.data + at : nullptr;
  if (out_dtype == FK_F32 && residual16)
    body(residual16, (float*)out + at);
  else if (out_dtype == FK_F32)
    body(residual32, (float*)out + at);
  else
    body(residual16, (bf16*)out + at);
}

template <class Out, class Residual>
FK_INLINE void group_norm_row(const float* raw, int64_t n, const struct fk_norm& norm, int64_t image,
                              const Residual* residual, Out* out) {
  const float mean = norm.groups[2 * image], rstd = norm.groups[2 * image + 1];
  const vf m = splat(mean), r = splat(rstd);
  int64_t i = 0;
  for (; i + FK_VL <= n; i += FK_VL) {
    vf y = (load(raw + i) - m) * r * load(norm.weight + i) + load(norm.bias + i);
    if (residual) y += load(residual + i);
    store(out + i, y);
  }
  for (; i < n; ++i) {
    float y = (raw[i] - mean) * rstd * norm.weight[i] + norm.bias[i];
    if (residual) y += to_float(residual[i]);
    from_float(out + i, y);
  }
}

void group_norm_rows(const struct fk_group_norm_rows* p, int64_t task) {
  const int64_t image = task / p->tasks_per_image, first = task % p->tasks_per_image * p->rows_per_task;
  const int64_t rows = min64(p->rows_per_task, p->rows - first), n = p->columns;
  const int64_t start = (image * (p->skipped + p->rows) + p->skipped + first) * n;
  const float* raw = p->raw + (image * p->rows + first) * n;
  for (int64_t i = 0; i < rows; ++i)
    with_row(p->residual, p->out, p->out_dtype, start + i * n,
             [&](auto residual, auto out) { group_norm_row(raw + i * n, n, p->norm, image, residual, out); });
  if (!p->moments) return;
  double* sums = p->moments + 3 * task;
  sums[0] = sums[1] = sums[2] = 0.0;
  add_rows(p->out, p->out_dtype, start, rows, n, sums);
}

}  // namespace
