// The maps of a chunk of hidden channels of depthwise_mlp, around its backward and around batch statistics: where they
// lie, and sums over their pixels.
#pragma once

#include "channel_norm.h"
#include "depthwise_mlp.h"
#include "depthwise_mlp_bands.h"

namespace {

// What there is of a stack. Maps of a chunk lie in planes of FK_VL channels: with a border of zeros as wide as the
// filter reaches around every image, which neighbours share, or dense.
template <class A>
struct MlpMaps {
  A* normed;  // [H * W][lda]: normalised x
  A* grad;    // [H * W][ldg]: gradient of the second linear's result
  // The same for products with the linears' weights, and as panels of a product that sums over a band's pixels.
  MlpReady<A> normed_ready, grad_ready;
  MlpPanels<A> normed_panels, grad_panels;
  float *hidden, *filtered_grad;  // bordered: the filter's input, the gradient of its result
  float *slope1, *hat1;           // dense: derivative of the hidden activation, what the first batch norm scales
  float *slope2, *hat2;           // the same behind the filter
  float* middle_grad;             // dense: gradient of the second linear's input
  float* hidden_grad;             // dense, between steps only; may take the place of `hat2`
  int64_t lda, ldg;
  int64_t bytes, chunk_bytes;       // of the store; of the chunk's maps, which may lie elsewhere
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

template <class A>
FK_INLINE MlpMaps<A> mlp_maps(const struct fk_depthwise_mlp_backward& p, void* base) {
  MlpMaps<A> m = {};
  char* at = (char*)base;
  const int64_t pixels = p.stack * p.height * p.width, reach = p.kernel / 2;
  const int64_t channels = round_up(p.channels, kPanel), out = round_up(p.out, kPanel), planes = p.chunk / FK_VL;
  const bool steps = p.stores;
  m.bordered = (p.stack * (p.height + reach) + reach) * mlp_line(p);
  m.dense = pixels * FK_VL;
  m.middle = p.adds_hidden ? m.dense : mlp_band_pixels(p) * FK_VL;
  const int64_t bordered = planes * m.bordered, dense = planes * m.dense;
  m.lda = channels + kRowPad;
  m.ldg = out + kRowPad;
  m.normed = take<A>(&at, pixels * m.lda);
  m.grad = take<A>(&at, pixels * m.ldg);
  m.normed_ready = MlpReady<A>::make(p, &at, !p.kept, m.normed, m.lda, p.channels);
  m.grad_ready = MlpReady<A>::make(p, &at, true, m.grad, m.ldg, p.out);
  m.normed_panels = MlpPanels<A>::make(p, &at, p.wants_expand, m.normed, m.lda, channels);
  m.grad_panels = MlpPanels<A>::make(p, &at, p.wants_project, m.grad, m.ldg, out);
  m.bytes = at - (char*)base;
  char* const chunk_maps = p.chunk_maps ? p.chunk_maps : at;
  at = chunk_maps;
  m.hidden = take<float>(&at, bordered);
  m.filtered_grad = take<float>(&at, bordered);
  m.slope1 = take<float>(&at, p.hidden_activation == FK_NO_ACTIVATION ? 0 : dense);
  m.hat1 = p.norm1.mean && (!p.kept || p.norms_after_activation) ? take<float>(&at, dense) : nullptr;
  m.slope2 = take<float>(&at, steps && p.norms_after_activation ? dense : 0);
  m.hat2 = take<float>(&at, steps && p.norm2.mean ? dense : 0);
  m.middle_grad = take<float>(&at, planes * m.middle);
  m.hidden_grad = steps && p.norm2.mean ? m.hat2 : take<float>(&at, steps ? dense : 0);
  m.chunk_bytes = at - chunk_maps;
  if (!p.chunk_maps) m.bytes += m.chunk_bytes;
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

// Values that the forward kept, in fp32 or bf16.
struct Kept {
  float* wide;  // one of them is null
  bf16* narrow;

  inline __attribute__((always_inline)) vf at(int64_t i) const { return narrow ? load(narrow + i) : load(wide + i); }
  inline __attribute__((always_inline)) void set(int64_t i, vf x) const {
    if (narrow)
      store(narrow + i, x);
    else
      store(wide + i, x);
  }
};
// Where what the first linear gave at a row is kept, of a stack that begins with `image`, for a vector of channels.
FK_INLINE Kept kept_row(const struct fk_depthwise_mlp_backward& p, int64_t image, int64_t channel, int64_t y) {
  const int64_t plane = (image + y / p.height) * p.kept_planes + channel / FK_VL;
  const int64_t at = (plane * p.height + y % p.height) * p.width * FK_VL;
  if (p.kept_dtype == FK_BF16) return {nullptr, (bf16*)p.kept + at};
  return {(float*)p.kept + at, nullptr};
}

template <int Kernel>
struct mlp_kernel {
  static constexpr int value = Kernel;
};

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

// A sum with what rounding took from it: gradients through batch statistics cancel. A few terms may be added up before:
// their products are rounded as much.
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

}  // namespace
