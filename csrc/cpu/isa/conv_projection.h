// CvT's convolutional projection for a band of rows of one image: LayerNorm into a zero-padded patch, depthwise
// convolution with batch normalisation folded in, linear. The patch and the convolved rows live in the cache only.
#pragma once

#include "rows.h"

namespace {

constexpr int kBranches = 3;

// Output rows of a branch that belong to a task: those whose centre row lies in the task's band of input rows.
struct Band {
  int64_t first, last;
};
FK_INLINE Band band_of(const struct fk_conv_projection& p, const struct fk_conv_branch& b, int64_t tile) {
  Band band;
  band.first = min64(ceil_div(tile * p.rows_per_task, b.stride), b.out_h);
  band.last =
      tile + 1 == p.tasks_per_image ? b.out_h : min64(ceil_div((tile + 1) * p.rows_per_task, b.stride), b.out_h);
  return band;
}

// The patch of the input that a task reads, in rows and columns of the zero-padded map.
struct Patch {
  int64_t top, rows, pad, columns, channels;
};
FK_INLINE Patch patch_of(const struct fk_conv_projection& p, int64_t tile) {
  Patch patch;
  patch.pad = 0;
  int64_t low = INT64_MAX, high = INT64_MIN;
  for (int i = 0; i < kBranches; ++i) {
    const struct fk_conv_branch& b = p.branch[i];
    patch.pad = max64(patch.pad, b.padding);
    Band band = band_of(p, b, tile);
    if (band.first == band.last) continue;
    low = min64(low, band.first * b.stride - b.padding);
    high = max64(high, (band.last - 1) * b.stride - b.padding + b.kernel);
  }
  patch.top = low > high ? 0 : low;
  patch.rows = low > high ? 0 : high - low;
  patch.columns = p.width + 2 * patch.pad;
  patch.channels = round_up(p.channels, FK_VL);
  return patch;
}

template <class A>
struct ProjectionScratch {
  float* patch;
  A* rows;  // prefix rows, then the convolved pixels of one branch
  int64_t lda, bytes;

  FK_INLINE ProjectionScratch layout(const struct fk_conv_projection& p, void* base) {
    int64_t patch_size = 0, pixels = 0;
    for (int64_t t = 0; t < p.tasks_per_image; ++t) {
      Patch patch = patch_of(p, t);
      patch_size = max64(patch_size, patch.rows * patch.columns * patch.channels);
      for (int i = 0; i < kBranches; ++i) {
        Band band = band_of(p, p.branch[i], t);
        pixels = max64(pixels, (band.last - band.first) * p.branch[i].out_w);
      }
    }
    ProjectionScratch s;
    s.lda = round_up(p.channels, FK_VL) + kRowPad;
    char* at = (char*)base;
    s.patch = (float*)at;
    at += round_up(patch_size * 4, 64);
    s.rows = (A*)at;
    at += round_up((p.prefix + pixels) * s.lda * (int64_t)sizeof(A), 64);
    s.bytes = at - (char*)base;
    return s;
  }
};

FK_INLINE void fill_zero(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
}

FK_INLINE void fill_patch(const struct fk_conv_projection& p, int64_t image, const Patch& patch, float* to) {
  const int64_t tokens = p.prefix + p.height * p.width;
  for (int64_t r = 0; r < patch.rows; ++r) {
    float* row = to + r * patch.columns * patch.channels;
    const int64_t y = patch.top + r;
    if (y < 0 || y >= p.height) {
      fill_zero(row, patch.columns * patch.channels);
      continue;
    }
    fill_zero(row, patch.pad * patch.channels);
    fill_zero(row + (patch.pad + p.width) * patch.channels, patch.pad * patch.channels);
    for (int64_t x = 0; x < p.width; ++x)
      normalize_row(p.x, image * tokens + p.prefix + y * p.width + x, p.channels, patch.channels, p.norm,
                    row + (patch.pad + x) * patch.channels);
  }
}

// `Pixels` neighbouring outputs of one row; `step` is the distance of their inputs.
template <int Pixels, int Kernel, class A>
FK_INLINE void convolve(const float* x, int64_t row_stride, int64_t channels, int64_t step, int64_t kernel,
                        const float* filter, const float* shift, A* out, int64_t ldo) {
  const int64_t k = Kernel ? Kernel : kernel;
  for (int64_t c = 0; c < channels; c += FK_VL) {
    vf sums[Pixels];
    for (int i = 0; i < Pixels; ++i) sums[i] = load(shift + c);
    for (int64_t ky = 0; ky < k; ++ky)
      for (int64_t kx = 0; kx < k; ++kx) {
        const vf w = load(filter + (ky * k + kx) * channels + c);
        const float* from = x + ky * row_stride + kx * channels + c;
#pragma GCC unroll 8
        for (int i = 0; i < Pixels; ++i) sums[i] += w * load(from + i * step);
      }
    for (int i = 0; i < Pixels; ++i) store(out + i * ldo + c, sums[i]);
  }
}

template <int Kernel, class A>
FK_INLINE void convolve_row(const float* x, int64_t width, int64_t row_stride, int64_t channels, int64_t step,
                            int64_t kernel, const float* filter, const float* shift, A* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 7 <= width; i += 7)
    convolve<7, Kernel>(x + i * step, row_stride, channels, step, kernel, filter, shift, out + i * ldo, ldo);
  for (; i + 3 <= width; i += 3)
    convolve<3, Kernel>(x + i * step, row_stride, channels, step, kernel, filter, shift, out + i * ldo, ldo);
  for (; i < width; ++i)
    convolve<1, Kernel>(x + i * step, row_stride, channels, step, kernel, filter, shift, out + i * ldo, ldo);
}

// All pixels of a branch's band, into rows of `out`.
template <class A>
static __attribute__((noinline)) void convolve_band(const struct fk_conv_branch& b, const Patch& patch, const float* x,
                                                    Band band, A* out, int64_t ldo) {
  const int64_t row_stride = patch.columns * patch.channels, step = b.stride * patch.channels;
  for (int64_t y = band.first; y < band.last; ++y) {
    const float* from =
        x + (y * b.stride - b.padding - patch.top) * row_stride + (patch.pad - b.padding) * patch.channels;
    A* to = out + (y - band.first) * b.out_w * ldo;
    if (b.kernel == 3)
      convolve_row<3>(from, b.out_w, row_stride, patch.channels, step, b.kernel, b.filter, b.shift, to, ldo);
    else
      convolve_row<0>(from, b.out_w, row_stride, patch.channels, step, b.kernel, b.filter, b.shift, to, ldo);
  }
}

// Per channel: sum over the band's pixels, and sum of squares around the band's own mean.
FK_INLINE void band_statistics(const float* rows, int64_t lda, int64_t pixels, int64_t channels, double* sums,
                               double* squares) {
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0.0, square = 0.0;
    for (int64_t i = 0; i < pixels; ++i) total += rows[i * lda + c];
    const double mean = pixels ? total / (double)pixels : 0.0;
    for (int64_t i = 0; i < pixels; ++i) {
      const double d = rows[i * lda + c] - mean;
      square += d * d;
    }
    sums[c] = total;
    squares[c] = square;
  }
}

template <class A>
FK_INLINE void projection_task(const struct fk_conv_projection& p, int64_t task, void* scratch) {
  const ProjectionScratch<A> s = ProjectionScratch<A>::layout(p, scratch);
  const int64_t image = task / p.tasks_per_image, tile = task % p.tasks_per_image;
  const Patch patch = patch_of(p, tile);
  fill_patch(p, image, patch, s.patch);
  const int64_t prefix = tile == 0 ? p.prefix : 0;
  const int64_t tokens = p.prefix + p.height * p.width;
  for (int64_t i = 0; i < prefix; ++i)
    normalize_row(p.x, image * tokens + i, p.channels, patch.channels, p.norm, s.rows + i * s.lda);
  const struct fk_array no_residual = {nullptr, FK_F32, 0};
  for (int i = 0; i < kBranches; ++i) {
    const struct fk_conv_branch& b = p.branch[i];
    if (!b.out) continue;
    const Band band = band_of(p, b, tile);
    convolve_band(b, patch, s.patch, band, s.rows + prefix * s.lda, s.lda);
    const int64_t rows = prefix + (band.last - band.first) * b.out_w;
    // Prefix rows stand right before the first band's pixels, in scratch and in the output alike.
    const int64_t out_tokens = p.prefix + b.out_h * b.out_w;
    const int64_t start = image * out_tokens + (tile == 0 ? 0 : p.prefix + band.first * b.out_w);
    if (!b.linear.panels) {
      for (int64_t row = 0; row < rows; ++row)
        copy_row(s.rows + row * s.lda, p.channels, p.channels, (A*)b.out + (start + row) * p.channels);
      continue;
    }
    const void* after = p.branch[(i + 1) % kBranches].linear.panels;
    const int64_t panels = ceil_div(b.linear.n, kPanel);
    product(
        s.rows, s.lda, rows, b.linear, 0, panels,
        [&](int64_t row, int64_t height, int64_t column, const float* tile_sums) {
          write_tile(tile_sums, kPanel, height, start + row, column, b.linear, b.out, p.out_dtype, no_residual);
        },
        INT64_MAX, panels, nullptr, after);
  }
}

FK_INLINE void statistics_task(const struct fk_conv_projection& p, int64_t task, void* scratch) {
  const ProjectionScratch<float> s = ProjectionScratch<float>::layout(p, scratch);
  const int64_t image = task / p.tasks_per_image, tile = task % p.tasks_per_image;
  const Patch patch = patch_of(p, tile);
  fill_patch(p, image, patch, s.patch);
  double* to = p.statistics + task * kBranches * 2 * p.channels;
  for (int i = 0; i < kBranches; ++i) {
    const Band band = band_of(p, p.branch[i], tile);
    convolve_band(p.branch[i], patch, s.patch, band, s.rows, s.lda);
    band_statistics(s.rows, s.lda, (band.last - band.first) * p.branch[i].out_w, p.channels, to + 2 * i * p.channels,
                    to + (2 * i + 1) * p.channels);
  }
}

int64_t scratch_conv_projection(const struct fk_conv_projection* p) {
  return ProjectionScratch<float>::layout(*p, nullptr).bytes;
}

void conv_projection(const struct fk_conv_projection* p, int64_t task, void* scratch) {
  if (p->statistics) return statistics_task(*p, task, scratch);
#if FK_NATIVE_BF16
  if (p->branch[0].linear.low_precision) return projection_task<bf16>(*p, task, scratch);
#endif
  projection_task<float>(*p, task, scratch);
}

}  // namespace
