// Gradients of depthwise convolutions, of the batch norms behind them and of the LayerNorm in front: up to three at
// once, as in the convolutional projection, whose linears' own gradients are those of any linear.
//
// The gradients go back through the batch norms, whose input is convolved once more, and become those of the
// convolutions' results, in a border of zeros; on the way they meet the patches of the input in the filters' gradients.
// At last every pixel collects from the results it took part in. With batch statistics the sums over the whole batch
// come first.
#pragma once

#include "backward.h"
#include "channel_norm.h"
#include "conv_projection.h"

namespace {

// Vector `c` of a row of n values.
template <class A>
FK_INLINE vf row_vector(const A* row, int64_t c, int64_t n) {
  return c + FK_VL <= n ? load(row + c) : load_tail(row + c, n - c);
}

// Adds a vector of sums to those of its channels.
FK_INLINE void add_lanes(vf value, double* to) {
  float lanes[FK_VL] __attribute__((aligned(64)));
  store(lanes, value);
  for (int i = 0; i < FK_VL; ++i) to[i] += (double)lanes[i];
}

// A task's share of one branch.
struct ConvBand {
  const struct fk_conv_projection_backward& p;
  const struct fk_conv_branch& forward;
  const struct fk_conv_branch_backward& branch;
  const Patch& patch;
  const float* x;  // the patch
  float* rows;     // [pixels][lda]: of the convolution's results
  int64_t lda, image;
  Band band;
  double* sums;  // [FK_CONV_TAPS + taps][padded channels]
};

template <class A>
FK_INLINE const A* linear_grads(const struct fk_conv_projection_backward& p, int branch, int64_t image, int64_t token) {
  const struct fk_conv_branch& b = p.forward.branch[branch];
  const int64_t tokens = p.forward.prefix + b.out_h * b.out_w;
  return (const A*)p.branch[branch].grad + (image * tokens + token) * p.forward.channels;
}

// Sums of the gradient behind the batch norm, alone and times the normalised value, and of the latter; with `Finish`
// the rows become the gradient in front of it.
template <bool Sums, bool Finish, class A>
static __attribute__((noinline)) void norm_band(const ConvBand& t, const A* grads) {
  const int64_t n = t.p.forward.channels, padded = t.patch.channels, width = t.forward.out_w;
  for (int64_t c = 0; c < padded; c += FK_VL) {
    const NormVectors norm = norm_vectors(t.branch.norm, c);
    vf total = splat(0.0f), total_times = splat(0.0f), total_x = splat(0.0f);
    for (int64_t y = 0; y < t.band.last - t.band.first; ++y) {
      vf alone = splat(0.0f), times = splat(0.0f), values = splat(0.0f);
      for (int64_t i = y * width; i < (y + 1) * width; ++i) {
        float* row = t.rows + i * t.lda + c;
        const vf grad = row_vector(grads + i * n, c, n);
        const vf hat = normalized(norm, load(row));
        if (Sums) {
          alone += grad;
          times += grad * hat;
          values += hat;
        }
        if (Finish) store(row, norm_input_grad(norm, grad, hat));
      }
      total += alone;
      total_times += times;
      total_x += values;
    }
    if (!Sums) continue;
    add_lanes(total, t.sums + FK_CONV_GRADS * padded + c);
    add_lanes(total_times, t.sums + FK_CONV_GRADS_X * padded + c);
    add_lanes(total_x, t.sums + FK_CONV_X * padded + c);
  }
}

// Sums of the gradients of the convolution's results.
FK_INLINE void sum_band(const ConvBand& t) {
  for (int64_t c = 0; c < t.patch.channels; c += FK_VL) {
    vf total = splat(0.0f);
    for (int64_t y = 0; y < t.band.last - t.band.first; ++y) {
      vf of_row = splat(0.0f);
      for (int64_t i = y * t.forward.out_w; i < (y + 1) * t.forward.out_w; ++i) of_row += load(t.rows + i * t.lda + c);
      total += of_row;
    }
    add_lanes(total, t.sums + FK_CONV_GRADS * t.patch.channels + c);
  }
}

// The gradients of the filter's taps from those of its results.
template <int Kernel>
static __attribute__((noinline)) void filter_grads(const ConvBand& t) {
  const int64_t padded = t.patch.channels, line = t.patch.columns * padded, step = t.forward.stride * padded;
  const int64_t kernel = t.forward.kernel, width = t.forward.out_w, pad = t.patch.pad - t.forward.padding;
  // A general filter goes tap by tap.
  constexpr int kTaps = Kernel ? Kernel : 1;
  for (int64_t c = 0; c < padded; c += FK_VL)
    for (int64_t tap = 0; tap < kernel * kernel; tap += kTaps * kTaps) {
      const int64_t top = t.band.first * t.forward.stride - t.forward.padding - t.patch.top + tap / kernel;
      const float* first = t.x + top * line + (pad + tap % kernel) * padded + c;
      vf totals[kTaps * kTaps];
      for (int i = 0; i < kTaps * kTaps; ++i) totals[i] = splat(0.0f);
      for (int64_t y = 0; y < t.band.last - t.band.first; ++y) {
        const float *x = first + y * t.forward.stride * line, *grad = t.rows + y * width * t.lda + c;
        vf sums[kTaps * kTaps];
        for (int i = 0; i < kTaps * kTaps; ++i) sums[i] = splat(0.0f);
        for (int64_t i = 0; i < width; ++i, x += step, grad += t.lda) {
          const vf g = load(grad);
#pragma GCC unroll 8
          for (int ky = 0; ky < kTaps; ++ky)
#pragma GCC unroll 8
            for (int kx = 0; kx < kTaps; ++kx) sums[ky * kTaps + kx] += g * load(x + ky * line + kx * padded);
        }
        for (int i = 0; i < kTaps * kTaps; ++i) totals[i] += sums[i];
      }
      for (int i = 0; i < kTaps * kTaps; ++i) add_lanes(totals[i], t.sums + (FK_CONV_TAPS + tap + i) * padded + c);
    }
}

// Where the gradient of output pixel (y, x) of an image lies in the branch's `slopes`.
FK_INLINE int64_t conv_slope(const struct fk_conv_branch_backward& b, int64_t image, int64_t y, int64_t x,
                             int64_t padded) {
  return ((image * b.slope_h + y + b.border) * b.slope_w + x + b.border) * padded;
}

// `finish`: beyond the sums over the whole batch.
template <class A>
FK_INLINE void conv_band(const ConvBand& t, int index, bool finish) {
  const struct fk_conv_projection_backward& p = t.p;
  const int64_t n = p.forward.channels, padded = t.patch.channels, width = t.forward.out_w;
  const int64_t pixels = (t.band.last - t.band.first) * width;
  const A* grads = linear_grads<A>(p, index, t.image, p.forward.prefix + t.band.first * width);
  if (t.branch.norm.mean) {
    convolve_band(t.forward, t.patch, t.x, t.band, t.rows, t.lda);
    if (!finish)
      norm_band<true, false>(t, grads);
    else if (p.training)
      norm_band<false, true>(t, grads);
    else
      norm_band<true, true>(t, grads);
  } else if (finish) {
    for (int64_t i = 0; i < pixels; ++i) copy_row(grads + i * n, n, padded, t.rows + i * t.lda);
    sum_band(t);
  }
  if (!finish) return;
  if (t.branch.wants_filter) {
    if (t.forward.kernel == 3)
      filter_grads<3>(t);
    else
      filter_grads<0>(t);
  }
  if (!t.branch.slopes) return;
  for (int64_t y = t.band.first; y < t.band.last; ++y) {
    A* to = (A*)t.branch.slopes + conv_slope(t.branch, t.image, y, 0, padded);
    for (int64_t x = 0; x < width; ++x, to += padded)
      copy_row(t.rows + ((y - t.band.first) * width + x) * t.lda, padded, padded, to);
  }
}

template <class A>
FK_INLINE void conv_backward_task(const struct fk_conv_projection_backward& p, int64_t partial, bool finish,
                                  void* scratch) {
  const struct fk_conv_projection& f = p.forward;
  const ProjectionScratch<float> s = ProjectionScratch<float>::layout(f, scratch);
  const BlockRange range = blocks_of(f.batch * f.tasks_per_image, 1, p.partials, partial);
  const int64_t of_branch = p.kinds * round_up(f.channels, FK_VL);
  double* sums = p.sums + partial * kBranches * of_branch;
  for (int64_t i = 0; i < kBranches * of_branch; ++i) sums[i] = 0.0;
  for (int64_t task = range.first; task < range.last; ++task) {
    const int64_t image = task / f.tasks_per_image, tile = task % f.tasks_per_image;
    const Patch patch = patch_of(f, tile);
    fill_patch(f, image, patch, s.patch);
    for (int i = 0; i < kBranches; ++i) {
      if (!p.branch[i].grad) continue;
      const ConvBand t = {p,
                          f.branch[i],
                          p.branch[i],
                          patch,
                          s.patch,
                          s.rows,
                          s.lda,
                          image,
                          band_of(f, f.branch[i], tile),
                          sums + i * of_branch};
      conv_band<A>(t, i, finish);
    }
  }
}

// `Pixels` pixels of the map, `step` values apart, from neighbouring results; taps of one residue class.
struct CollectTaps {
  int64_t rows, columns;            // taps
  int64_t filter_row, filter_step;  // between them in the filter
  int64_t line;                     // between the results of a column of taps
};
template <int Pixels, class A>
FK_INLINE void collect(const A* slopes, const float* filter, const CollectTaps& taps, int64_t padded, int64_t step,
                       bool accumulate, float* out) {
  for (int64_t c = 0; c < padded; c += FK_VL) {
    vf sums[Pixels];
#pragma GCC unroll 8
    for (int i = 0; i < Pixels; ++i) sums[i] = accumulate ? load(out + i * step + c) : splat(0.0f);
    for (int64_t ky = 0; ky < taps.rows; ++ky)
      for (int64_t kx = 0; kx < taps.columns; ++kx) {
        const vf w = load(filter + ky * taps.filter_row + kx * taps.filter_step + c);
        const A* from = slopes - ky * taps.line - kx * padded + c;
#pragma GCC unroll 8
        for (int i = 0; i < Pixels; ++i) sums[i] += w * load(from + i * padded);
      }
#pragma GCC unroll 8
    for (int i = 0; i < Pixels; ++i) store(out + i * step + c, sums[i]);
  }
}

// The first number from 0 on that leaves this remainder.
FK_INLINE int64_t first_of_class(int64_t remainder, int64_t modulus) {
  return remainder % modulus < 0 ? remainder % modulus + modulus : remainder % modulus;
}

// What a branch adds to row `y` of the gradient of the normalised map.
template <class A>
static __attribute__((noinline)) void collect_row(const struct fk_conv_projection_backward& p, int index, int64_t image,
                                                  int64_t y, bool accumulate, float* out) {
  const struct fk_conv_branch& f = p.forward.branch[index];
  const struct fk_conv_branch_backward& b = p.branch[index];
  const int64_t padded = round_up(p.forward.channels, FK_VL), s = f.stride, step = s * padded;
  const int64_t class_y = (y + f.padding) % s;
  for (int64_t class_x = 0; class_x < s; ++class_x) {
    const CollectTaps taps = {class_y < f.kernel ? ceil_div(f.kernel - class_y, s) : 0,
                              class_x < f.kernel ? ceil_div(f.kernel - class_x, s) : 0, s * f.kernel * padded,
                              s * padded, b.slope_w * padded};
    const float* filter = f.filter + (class_y * f.kernel + class_x) * padded;
    const int64_t first = first_of_class(class_x - f.padding, s);
    int64_t left = first < p.forward.width ? ceil_div(p.forward.width - first, s) : 0;
    const bool none = taps.rows == 0 || taps.columns == 0;
    const A* from = none ? (const A*)b.slopes
                         : (const A*)b.slopes + conv_slope(b, image, (y + f.padding - class_y) / s,
                                                           (first + f.padding - class_x) / s, padded);
    float* to = out + first * padded;
    auto next = [&](int64_t pixels) {
      from += none ? 0 : pixels * padded;
      to += pixels * step;
      left -= pixels;
    };
    for (; left >= 7; next(7)) collect<7>(from, filter, taps, padded, step, accumulate, to);
    for (; left >= 3; next(3)) collect<3>(from, filter, taps, padded, step, accumulate, to);
    for (; left >= 1; next(1)) collect<1>(from, filter, taps, padded, step, accumulate, to);
  }
}

// A band of rows of the map, the first one with the prefix tokens.
template <class A>
FK_INLINE void conv_input_task(const struct fk_conv_projection_backward& p, int64_t task, void* scratch) {
  const struct fk_conv_projection& f = p.forward;
  const int64_t image = task / p.bands, top = task % p.bands * p.rows_per_band;
  const int64_t bottom = min64(top + p.rows_per_band, f.height), n = f.channels, padded = round_up(n, FK_VL);
  const int64_t prefix = top == 0 ? f.prefix : 0, rows = prefix + (bottom - top) * f.width;
  float* grads = (float*)scratch;
  float* sums = grads + (f.prefix + p.rows_per_band * f.width) * padded;
  for (int64_t i = 0; i < prefix; ++i)
    for (int64_t c = 0; c < padded; c += FK_VL) {
      vf total = splat(0.0f);
      for (int b = 0; b < kBranches; ++b) total += row_vector(linear_grads<A>(p, b, image, i), c, n);
      store(grads + i * padded + c, total);
    }
  for (int b = 0; b < kBranches; ++b)
    for (int64_t y = top; y < bottom && p.branch[b].slopes; ++y)
      collect_row<A>(p, b, image, y, b > 0, grads + (prefix + (y - top) * f.width) * padded);
  float* total = p.affine ? p.affine + task * round_up(2 * n, kPanel) : nullptr;
  if (total) clear(total, round_up(2 * n, kPanel));
  const RowSums affine = RowSums::over(sums, 2 * n, total);
  const int64_t start = image * (f.prefix + f.height * f.width) + (top == 0 ? 0 : f.prefix + top * f.width);
  for (int64_t i = 0; i < rows; ++i) {
    norm_backward_row(f.x, start + i, grads + i * padded, n, f.norm, p.dx, p.own, total ? affine.near : nullptr);
    RowSums::next(affine, i, rows);
  }
}

void conv_projection_backward(const struct fk_conv_projection_backward* p, int64_t partial, int32_t finish,
                              void* scratch) {
  if (p->dtype == FK_BF16) return conv_backward_task<bf16>(*p, partial, finish, scratch);
  conv_backward_task<float>(*p, partial, finish, scratch);
}

int64_t scratch_conv_projection_input(const struct fk_conv_projection_backward* p) {
  const struct fk_conv_projection& f = p->forward;
  return ((f.prefix + p->rows_per_band * f.width) * round_up(f.channels, FK_VL) + 4 * round_up(f.channels, FK_VL)) * 4;
}

void conv_projection_input(const struct fk_conv_projection_backward* p, int64_t task, void* scratch) {
  if (p->dtype == FK_BF16) return conv_input_task<bf16>(*p, task, scratch);
  conv_input_task<float>(*p, task, scratch);
}

}  // namespace
