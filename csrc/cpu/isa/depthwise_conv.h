// A depthwise convolution of a map for a tile of its pixels: taps are read from the map where it lies, or, behind a
// LayerNorm, from normalised pixels in the cache. Zero padding is never read: taps beside the map are left out.
#pragma once

#include "rows.h"

namespace {

// The pixels of the result that belong to a task.
struct ConvTile {
  int64_t image, top, bottom, left, right;
};
FK_INLINE ConvTile conv_tile(const struct fk_depthwise_conv& p, int64_t task) {
  const int64_t across = ceil_div(p.out_w, p.columns_per_task), down = ceil_div(p.out_h, p.rows_per_task);
  ConvTile t;
  t.left = task % across * p.columns_per_task;
  t.right = min64(t.left + p.columns_per_task, p.out_w);
  t.top = task / across % down * p.rows_per_task;
  t.bottom = min64(t.top + p.rows_per_task, p.out_h);
  t.image = task / across / down;
  return t;
}

// Pixels of the map [top, bottom) x [left, right) from `data` on, lines of them `line` values apart.
template <class T>
struct Window {
  const T* data;
  int64_t top, bottom, left, right, line;
};

// The pixels of the map that a tile reads.
template <class T>
FK_INLINE Window<T> conv_window(const struct fk_depthwise_conv& p, const ConvTile& t) {
  Window<T> w;
  w.data = nullptr;
  w.top = max64(0, t.top * p.stride - p.padding);
  w.bottom = max64(w.top, min64(p.height, (t.bottom - 1) * p.stride - p.padding + p.kernel));
  w.left = max64(0, t.left * p.stride - p.padding);
  w.right = max64(w.left, min64(p.width, (t.right - 1) * p.stride - p.padding + p.kernel));
  w.line = (w.right - w.left) * p.channels;
  return w;
}

template <bool Tail, class T>
FK_INLINE vf conv_load(const T* x, int64_t n) {
  return Tail ? load_tail(x, n) : load(x);
}

// What the loops over pixels and channels read. A copy that nothing else can write to stays in registers.
template <class T, class Out>
struct ConvLoop {
  const float *filter, *shift;
  const Out* residual;  // null: none
  Out* out;
  int64_t kernel, channels, padded;
  int64_t line, step;  // from a tap to the one below; from a pixel of the result to its neighbour, in the map
};

// The taps of a row of pixels that lie on the map: rows [y0, y1) and columns [x0, x1) of the filter.
struct Taps {
  int64_t y0, y1, x0, x1;
};

// `Pixels` neighbouring results at channels [c, c + lanes); their first taps begin at `x`, the results at `at`.
// Kernel 3 stands for one with all of its columns and neighbours one pixel apart, 0 for any.
template <int Pixels, int Kernel, bool Tail, class T, class Out>
FK_INLINE void convolve_channels(const ConvLoop<T, Out>& p, const T* x, const Taps& taps, int64_t c, int64_t at) {
  const int64_t n = p.channels;
  vf sums[Pixels];
#pragma GCC unroll 8
  for (int i = 0; i < Pixels; ++i) sums[i] = load(p.shift + c);
  for (int64_t ky = taps.y0; ky < taps.y1; ++ky) {
    const T* row = x + (ky - taps.y0) * p.line + c;
    const float* filter = p.filter + ky * p.kernel * p.padded + c;
    if (Kernel == 3) {
      const vf w0 = load(filter), w1 = load(filter + p.padded), w2 = load(filter + 2 * p.padded);
      vf a = conv_load<Tail>(row, n), b = conv_load<Tail>(row + n, n);
#pragma GCC unroll 8
      for (int i = 0; i < Pixels; ++i) {
        const vf next = conv_load<Tail>(row + (i + 2) * n, n);
        sums[i] += a * w0;
        sums[i] += b * w1;
        sums[i] += next * w2;
        a = b;
        b = next;
      }
    } else {
      for (int64_t kx = taps.x0; kx < taps.x1; ++kx) {
        const vf w = load(filter + kx * p.padded);
        const T* from = row + (kx - taps.x0) * n;
#pragma GCC unroll 8
        for (int i = 0; i < Pixels; ++i) sums[i] += w * conv_load<Tail>(from + i * p.step, n);
      }
    }
  }
  if (p.residual) {
#pragma GCC unroll 8
    for (int i = 0; i < Pixels; ++i) sums[i] += conv_load<Tail>(p.residual + at + i * n + c, n);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Pixels; ++i)
    if (Tail)
      store_tail(p.out + at + i * n + c, sums[i], n);
    else
      store(p.out + at + i * n + c, sums[i]);
}

// All channels of `Pixels` neighbouring results.
template <int Pixels, int Kernel, class T, class Out>
FK_INLINE void convolve_pixels(const ConvLoop<T, Out>& p, const T* x, const Taps& taps, int64_t at) {
  if (p.channels < FK_VL) return convolve_channels<Pixels, Kernel, true>(p, x, taps, 0, at);
  int64_t c = 0;
  for (; c + FK_VL <= p.channels; c += FK_VL) convolve_channels<Pixels, Kernel, false>(p, x, taps, c, at);
  // The last channels once more rather than one by one.
  if (c < p.channels) convolve_channels<Pixels, Kernel, false>(p, x, taps, p.channels - FK_VL, at);
}

// Columns [first, last) of a row of the result.
template <int Kernel, class T, class Out>
static __attribute__((noinline)) void convolve_row(const struct fk_depthwise_conv& c, const Window<T>& w, int64_t image,
                                                   int64_t row, int64_t first, int64_t last) {
  const ConvLoop<T, Out> p = {c.filter,
                              c.shift,
                              (const Out*)(c.residual.dtype == c.out_dtype ? c.residual.data : nullptr),
                              (Out*)c.out,
                              c.kernel,
                              c.channels,
                              round_up(c.channels, FK_VL),
                              w.line,
                              c.stride * c.channels};
  const int64_t top = row * c.stride - c.padding, width = c.width, padding = c.padding, stride = c.stride;
  Taps taps = {min64(max64(0, -top), p.kernel), 0, 0, p.kernel};
  taps.y1 = max64(taps.y0, min64(p.kernel, c.height - top));
  const T* line = w.data + (top + taps.y0 - w.top) * w.line;
  const int64_t start = (image * c.out_h + row) * c.out_w;
  // Between these columns no tap lies beside the map.
  const int64_t room = width - p.kernel + padding;
  const int64_t begin = min64(max64(first, ceil_div(padding, stride)), last);
  const int64_t end = room < 0 ? begin : min64(max64(begin, room / stride + 1), last);
  auto pixels_from = [&](int64_t x) { return line + (x * stride - padding - w.left) * p.channels; };
  auto edge = [&](int64_t x) {
    const int64_t left = x * stride - padding;
    Taps some = taps;
    some.x0 = min64(max64(0, -left), p.kernel);
    some.x1 = max64(some.x0, min64(p.kernel, width - left));
    convolve_pixels<1, 0>(p, pixels_from(x) + some.x0 * p.channels, some, (start + x) * p.channels);
  };
  int64_t x = first;
  for (; x < begin; ++x) edge(x);
  for (; x + 6 <= end; x += 6) convolve_pixels<6, Kernel>(p, pixels_from(x), taps, (start + x) * p.channels);
  for (; x + 3 <= end; x += 3) convolve_pixels<3, Kernel>(p, pixels_from(x), taps, (start + x) * p.channels);
  for (; x < last; ++x) edge(x);
  // A residual in another dtype than the result, which is then fp32.
  if (c.residual.data && c.residual.dtype != c.out_dtype)
    for (int64_t at = (start + first) * p.channels; at < (start + last) * p.channels; at += p.channels)
      add_rows_into((const float*)c.out + at, (const bf16*)c.residual.data + at, p.channels, (float*)c.out + at);
}

template <class T, class Out>
FK_INLINE void convolve_tile(const struct fk_depthwise_conv& p, const ConvTile& t, const Window<T>& w) {
  for (int64_t y = t.top; y < t.bottom; ++y)
    if (p.kernel == 3 && p.stride == 1)
      convolve_row<3, T, Out>(p, w, t.image, y, t.left, t.right);
    else
      convolve_row<0, T, Out>(p, w, t.image, y, t.left, t.right);
}

template <class T>
FK_INLINE void convolve_tile(const struct fk_depthwise_conv& p, const ConvTile& t, const Window<T>& w) {
  if (p.out_dtype == FK_F32)
    convolve_tile<T, float>(p, t, w);
  else
    convolve_tile<T, bf16>(p, t, w);
}

// The map of an image where it lies.
template <class T>
FK_INLINE Window<T> whole_map(const struct fk_depthwise_conv& p, int64_t image) {
  const int64_t line = p.width * p.channels;
  return {(const T*)p.x.data + image * p.height * line, 0, p.height, 0, p.width, line};
}

int64_t scratch_depthwise_conv(const struct fk_depthwise_conv* p) {
  if (p->norm.kind == FK_NO_NORM) return 0;
  const int64_t rows = min64(p->height, (p->rows_per_task - 1) * p->stride + p->kernel);
  return rows * min64(p->width, (p->columns_per_task - 1) * p->stride + p->kernel) * p->channels * 4;
}

void depthwise_conv(const struct fk_depthwise_conv* p, int64_t task, void* scratch) {
  const ConvTile t = conv_tile(*p, task);
  if (p->norm.kind == FK_NO_NORM) {
    if (p->x.dtype == FK_F32) return convolve_tile(*p, t, whole_map<float>(*p, t.image));
    return convolve_tile(*p, t, whole_map<bf16>(*p, t.image));
  }
  Window<float> w = conv_window<float>(*p, t);
  float* to = (float*)scratch;
  w.data = to;
  for (int64_t y = w.top; y < w.bottom; ++y)
    for (int64_t x = w.left; x < w.right; ++x, to += p->channels)
      normalize_row(p->x, (t.image * p->height + y) * p->width + x, p->channels, p->channels, p->norm, to);
  convolve_tile(*p, t, w);
}

}  // namespace
