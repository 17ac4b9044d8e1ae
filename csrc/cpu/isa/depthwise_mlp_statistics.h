// The forward of depthwise_mlp with batch statistics. A batch norm needs the whole batch before the next step begins,
// so all images take a step for one chunk of hidden channels, then the next step: expansion, filter, projection. Their
// maps of a chunk wait in the cache; nothing is computed twice.
#pragma once

#include "depthwise_mlp_maps.h"

namespace {

// What an image keeps from step to step. Maps have a border, as in MlpMaps.
template <class A>
struct BatchMaps {
  A* normed;                 // [H * W][lda]
  char* ready;               // the same for products with every chunk's weights; null: nothing is ready
  float *hidden, *filtered;  // the filter's input, and its result
  float* branch;             // [H * W][ldb]: the second linear's result, of the chunks so far
  int64_t lda, ldb, bordered, bytes;
};
template <class A>
FK_INLINE BatchMaps<A> batch_maps(const struct fk_depthwise_mlp_backward& p, void* base) {
  BatchMaps<A> m;
  char* at = (char*)base;
  const int64_t pixels = p.height * p.width, reach = p.kernel / 2;
  m.lda = round_up(p.channels, kPanel) + kRowPad;
  m.ldb = round_up(p.out, kPanel) + kRowPad;
  m.bordered = (p.height + 2 * reach) * mlp_line(p);
  m.normed = take<A>(&at, pixels * m.lda);
  const bool ready = sizeof(A) == 4 && prepares<A>(p.chunk / kPanel, p.channels);
  m.ready = ready ? take<char>(&at, prepared_bytes<A>(pixels, p.channels)) : nullptr;
  m.hidden = take<float>(&at, p.chunk / FK_VL * m.bordered);
  m.filtered = take<float>(&at, p.chunk / FK_VL * m.bordered);
  m.branch = take<float>(&at, p.branch ? pixels * m.ldb : 0);
  m.bytes = at - (char*)base;
  return m;
}

template <class A>
struct BatchChunk {
  const struct fk_depthwise_mlp_backward& p;
  const BatchMaps<A>& m;
  int64_t image, channels;  // of p.first on, with padding
  int64_t line, corner;     // of a bordered map: values of a line, and where its first pixel is
};

template <class T>
FK_INLINE vf load_lanes(const T* from, int64_t lanes) {
  return lanes < FK_VL ? load_tail(from, lanes) : load(from);
}

// Per channel of a vector, over pixels: the sum, and the sum of squares around the mean, from those around the first
// pixel's value. That is off by no more standard deviations than there are pixels, roots taken, and so are the sums
// around it, whose rounding is kept, too.
struct PixelMoments {
  vf first;
  ExactSum rests, squares;

  // Neighbours' differences from `first`, and these squared.
  inline __attribute__((always_inline)) void add(vf rest, vf square) {
    rests.add(rest);
    squares.add(square);
  }
  // Of `n` pixels.
  inline __attribute__((always_inline)) void finish(double n, int64_t lanes, double* to_sums, double* to_squares) {
    float found[5][FK_VL] __attribute__((aligned(64)));
    store(found[0], first);
    store(found[1], rests.total);
    store(found[2], rests.lost);
    store(found[3], squares.total);
    store(found[4], squares.lost);
    for (int64_t i = 0; i < lanes; ++i) {
      const double rest = (double)found[1][i] + (double)found[2][i];
      to_sums[i] = n * (double)found[0][i] + rest;
      to_squares[i] = (double)found[3][i] + (double)found[4][i] - rest * rest / n;
    }
  }
};
// Neighbours whose sums are rounded as such.
constexpr int64_t kFewPixels = 8;

// Of the first `lanes` channels of a vector, over rows of pixels `step` apart.
FK_INLINE void pixel_moments(const float* from, int64_t step, int64_t line, int64_t rows, int64_t width, int64_t lanes,
                             double* sums, double* squares) {
  PixelMoments found = {load_lanes(from, lanes), {}, {}};
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < width; x += kFewPixels) {
      vf rest = splat(0.0f), square = splat(0.0f);
      for (int64_t i = x; i < min64(x + kFewPixels, width); ++i) {
        const vf d = load_lanes(from + y * line + i * step, lanes) - found.first;
        rest += d;
        square += d * d;
      }
      found.add(rest, square);
    }
  found.finish((double)(rows * width), lanes, sums, squares);
}
// Those of a vector of channels of a chunk's map.
template <class A>
FK_INLINE void finish_map(const BatchChunk<A>& c, int64_t at, PixelMoments* found) {
  double* sums = c.p.sums + c.image * 2 * c.p.rows + at;
  found->finish((double)(c.p.height * c.p.width), FK_VL, sums, sums + c.p.rows);
}

// What the first norm meets, into the hidden map, and its moments.
template <class A, fk_activation Activation>
static __attribute__((noinline)) void expand_unnormed(const BatchChunk<A>& c) {
  constexpr bool kLow = sizeof(A) == 2;
  const struct fk_depthwise_mlp_backward& p = c.p;
  const int64_t first = p.first / kPanel;
  const int64_t panels = ceil_div(c.channels, kPanel);
  PixelMoments moments[FK_MOST_STATISTICS_CHUNK / FK_VL];
  product(
      c.m.normed, c.m.lda, p.height * p.width, p.expand, first, first + panels,
      [&](int64_t row, int64_t height, int64_t n, const float* tile) {
        for (int j = 0; j < FK_NV; ++j) {
          const int64_t channel = n + j * FK_VL, plane = (channel - p.first) / FK_VL;
          if (channel - p.first >= c.channels) continue;  // padding
          PixelMoments& found = moments[plane];
          vf rest = splat(0.0f), square = splat(0.0f);
          const vf bias = load(p.expand.bias + channel);
          int64_t y = row / p.width, x = row % p.width;
          const Kept kept = p.kept ? kept_row(p, c.image, channel, 0) : Kept{};
          float* map = c.m.hidden + plane * c.m.bordered + c.corner;
          for (int64_t i = 0; i < height; ++i) {
            vf v = load(tile + i * kPanel + j * FK_VL) + bias;
            if (p.kept) {
              kept.set((row + i) * FK_VL, v);
              v = kept.at((row + i) * FK_VL);  // as the backward will read it
            }
            v = activate<kLow, Activation>(v);
            store(map + y * c.line + x * FK_VL, v);
            if (row + i == 0) found = {v, {}, {}};
            v -= found.first;
            rest += v;
            square += v * v;
            if ((i + 1) % kFewPixels == 0 || i + 1 == height) {
              found.add(rest, square);
              rest = square = splat(0.0f);
            }
            if (++x == p.width) {
              x = 0;
              ++y;
            }
          }
        }
      },
      INT64_MAX, panels, c.m.ready);
  for (int64_t at = 0; at < c.channels; at += FK_VL) finish_map(c, at, moments + at / FK_VL);
}

// The first norm, and the activation behind it, in place.
template <class A, fk_activation Activation>
static __attribute__((noinline)) void norm_hidden(const BatchChunk<A>& c) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    const NormVectors norm = norm_vectors(p.norm1, p.first + at);
    for (int64_t y = 0; y < p.height; ++y) {
      float* to = c.m.hidden + at / FK_VL * c.m.bordered + c.corner + y * c.line;
      for (int64_t x = 0; x < p.width; ++x, to += FK_VL) {
        vf v = load(to);
        if (norm.present) v = normalized(norm, v) * norm.weight + norm.bias;
        store(to, activate<sizeof(A) == 2, Activation>(v));
      }
    }
  }
}

// What the second norm meets, into the map of the filter's results, and its moments.
template <class A, int Kernel, fk_activation Activation>
static __attribute__((noinline)) void filter_unnormed(const BatchChunk<A>& c) {
  constexpr bool kLow = sizeof(A) == 2;
  const struct fk_depthwise_mlp_backward& p = c.p;
  constexpr int64_t step = FK_VL;
  const int64_t taps_step = round_up(p.expand.n, kPanel), reach = p.kernel / 2;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    const int64_t plane = at / FK_VL * c.m.bordered;
    const vf bias = load(p.filter_bias + p.first + at);
    PixelMoments found = {};
    for (int64_t y = 0; y < p.height; ++y) {
      const float *from = c.m.hidden + plane + y * c.line, *filter = p.filter + p.first + at;
      const float* centre = from + reach * (c.line + step);
      float* to = c.m.filtered + plane + c.corner + y * c.line;
      vf rest = splat(0.0f), square = splat(0.0f);
      const auto take = [&](int64_t x, vf sum) __attribute__((always_inline)) {
        if (p.adds_input) sum += load(centre + x * step);
        const vf v = activate<kLow, Activation>(sum);
        store(to + x * step, v);
        if (x + y == 0) found = {v, {}, {}};
        const vf d = v - found.first;
        rest += d;
        square += d * d;
      };
      int64_t x = 0;
      for (; x + 7 <= p.width; x += 7) {
        vf sums[7];
        filter_sums<7, Kernel>(from + x * step, c.line, step, filter, taps_step, bias, p.kernel, sums);
#pragma GCC unroll 8
        for (int i = 0; i < 7; ++i) take(x + i, sums[i]);
        found.add(rest, square);
        rest = square = splat(0.0f);
      }
      for (; x < p.width; ++x) {
        vf sum;
        filter_sums<1, Kernel>(from + x * step, c.line, step, filter, taps_step, bias, p.kernel, &sum);
        take(x, sum);
      }
      found.add(rest, square);
    }
    finish_map(c, at, &found);
  }
}

// The second norm and what comes behind it, as rows of the second linear: pixels [from, to) of image rows [first,
// last).
template <class A, fk_activation Activation>
static __attribute__((noinline)) void middle_of_rows(const BatchChunk<A>& c, int64_t first, int64_t last, A* rows,
                                                     int64_t stride) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  for (int64_t at = 0; at < c.channels; at += FK_VL) {
    const NormVectors norm = norm_vectors(p.norm2, p.first + at);
    const int64_t plane = at / FK_VL * c.m.bordered + c.corner;
    for (int64_t y = first; y < last; ++y) {
      const float *from = c.m.filtered + plane + y * c.line, *hidden = c.m.hidden + plane + y * c.line;
      A* to = rows + (y - first) * p.width * stride + at;
      for (int64_t x = 0; x < p.width; ++x, to += stride) {
        vf v = load(from + x * FK_VL);
        if (norm.present) v = normalized(norm, v) * norm.weight + norm.bias;
        v = activate<sizeof(A) == 2, Activation>(v);
        if (p.adds_hidden) v += load(hidden + x * FK_VL);
        store(to, v);
      }
    }
  }
}

// Adds the chunk's share to the second linear's results.
template <class A>
FK_INLINE void project_chunk(const BatchChunk<A>& c, A* rows, int64_t stride) {
  const struct fk_depthwise_mlp_backward& p = c.p;
  const Panels<A> w = panels_of<A>(p.project, 0, ceil_div(p.out, kPanel), p.first, c.channels);
  for (int64_t first = 0; first < p.height; first += p.rows_per_band) {
    const int64_t last = min64(first + p.rows_per_band, p.height);
    with_activation(p.norms_after_activation ? FK_NO_ACTIVATION : p.activation,
                    [&](auto activation) { middle_of_rows<A, activation.value>(c, first, last, rows, stride); });
    products(rows, stride, (last - first) * p.width, w, c.m.branch + first * p.width * c.m.ldb, c.m.ldb, kPanel,
             p.first > 0);
  }
}

// The second linear's bias, its results, and what the third norm meets.
template <class A>
FK_INLINE void finish_branch(const struct fk_depthwise_mlp_backward& p, const BatchMaps<A>& m, int64_t image) {
  const int64_t pixels = p.height * p.width;
  double *sums = p.sums + image * 2 * p.rows, *squares = sums + p.rows;
  for (int64_t i = 0; i < pixels; ++i) {
    float *row = m.branch + i * m.ldb, *to = p.branch + (image * pixels + i) * p.out;
    for (int64_t n = 0; n < p.out; n += FK_VL) {
      const vf v = load(row + n) + load(p.project.bias + n);
      store(row + n, v);
      if (n + FK_VL <= p.out)
        store(to + n, v);
      else
        store_tail(to + n, v, p.out - n);
    }
  }
  for (int64_t n = 0; n < p.out; n += FK_VL)
    pixel_moments(m.branch + n, m.ldb, p.width * m.ldb, p.height, p.width, FK_VL, sums + n, squares + n);
}

// Step 0 prepares an image; for a chunk, step 1 has what the first norm meets, step 2 the second, step 3 projects; step
// 4 has what the third one meets.
template <class A>
FK_INLINE void statistics_step(const struct fk_depthwise_mlp_backward& p, int64_t step, int64_t image, void* scratch) {
  const BatchMaps<A> m = batch_maps<A>(p, p.stores[image]);
  const int64_t pixels = p.height * p.width, reach = p.kernel / 2, line = mlp_line(p);
  if (step == 0) {
    const int64_t x = (image * (p.prefix + pixels) + p.prefix) * p.channels;
    for (int64_t i = 0; i < pixels; ++i)
      any_norm_row(p.x, x + i * p.channels, p.channels, round_up(p.channels, kPanel), p.norm, image,
                   m.normed + i * m.lda);
    if (m.ready) prepare(m.normed, m.lda, pixels, p.channels, p.chunk / kPanel, m.ready);
    return clear_border(p, m.hidden, m.bordered, 1);
  }
  if (step == 4) return finish_branch(p, m, image);
  const BatchChunk<A> c = {
      p, m, image, round_up(min64(p.chunk, p.expand.n - p.first), FK_VL), line, reach * (line + FK_VL)};
  const bool after = p.norms_after_activation;
  if (step == 1)
    return with_activation(after ? p.hidden_activation : FK_NO_ACTIVATION,
                           [&](auto activation) { expand_unnormed<A, activation.value>(c); });
  if (step == 3) return project_chunk(c, (A*)scratch, p.chunk + kRowPad);
  with_activation(after ? FK_NO_ACTIVATION : p.hidden_activation,
                  [&](auto activation) { norm_hidden<A, activation.value>(c); });
  with_activation(after ? p.activation : FK_NO_ACTIVATION, [&](auto activation) {
    with_kernel(p.kernel,
                [&](auto kernel) { filter_unnormed<A, decltype(kernel)::value, decltype(activation)::value>(c); });
  });
}

int64_t store_depthwise_mlp_statistics(const struct fk_depthwise_mlp_backward* p) {
  return batch_maps<float>(*p, nullptr).bytes;
}

int64_t scratch_depthwise_mlp_statistics(const struct fk_depthwise_mlp_backward* p) {
  return min64(p->rows_per_band, p->height) * p->width * (p->chunk + kRowPad) * 4;
}

void depthwise_mlp_statistics(const struct fk_depthwise_mlp_backward* p, int64_t step, int64_t image, void* scratch) {
#if FK_NATIVE_BF16
  if (p->expand.low_precision) return statistics_step<bf16>(*p, step, image, scratch);
#endif
  statistics_step<float>(*p, step, image, scratch);
}

// Sums and squares of the channels of an image.
void channel_moments(const struct fk_channel_moments* p, int64_t image) {
  const float* from = p->x + (image * (p->skipped + p->rows) + p->skipped) * p->columns;
  double *sums = p->sums + image * 2 * p->columns, *squares = sums + p->columns;
  for (int64_t n = 0; n < p->columns; n += FK_VL)
    pixel_moments(from + n, p->columns, p->columns, p->rows, 1, min64(FK_VL, p->columns - n), sums + n, squares + n);
}

// Step 0 sums up gradients, alone and times the normalised value; step 1 turns them into those of the norm's input.
void batch_norm_backward(const struct fk_batch_norm_backward* p, int64_t step, int64_t task) {
  const int64_t image = task / p->tasks_per_image, first = task % p->tasks_per_image * p->rows_per_task;
  const int64_t rows = min64(p->rows_per_task, p->rows - first), columns = p->columns;
  const float* x = p->x + (image * (p->skipped + p->rows) + p->skipped + first) * columns;
  float* grad = p->grad + (image * p->rows + first) * columns;
  for (int64_t n = 0; n < columns; n += FK_VL) {
    const int64_t lanes = min64(FK_VL, columns - n);
    const NormVectors norm = norm_vectors(p->norm, n);
    const vf mean_rest = load(p->mean_rest + n), scale = norm.weight * norm.rstd;
    vf alone = splat(0.0f), times = splat(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const vf d = (load_lanes(x + i * columns + n, lanes) - norm.mean) - mean_rest;
      const vf hat = d * norm.rstd + d * norm.rest, g = load_lanes(grad + i * columns + n, lanes);
      if (step == 0) {
        alone += g;
        times += g * hat;
        continue;
      }
      const vf out = scale * (g - (norm.grad_mean + hat * norm.grad_slope));
      if (lanes < FK_VL)
        store_tail(grad + i * columns + n, out, lanes);
      else
        store(grad + i * columns + n, out);
    }
    if (step) continue;
    float found[2][FK_VL] __attribute__((aligned(64)));
    store(found[0], alone);
    store(found[1], times);
    for (int64_t i = 0; i < lanes; ++i) {
      p->sums[task * 2 * columns + n + i] = found[0][i];
      p->sums[(task * 2 + 1) * columns + n + i] = found[1][i];
    }
  }
}

template <class Out, class Residual>
FK_INLINE void batch_norm_row(const float* raw, int64_t n, const struct fk_channel_norm& norm, const Residual* residual,
                              Out* out, float* sums) {
  for (int64_t i = 0; i < n; i += FK_VL) {
    const NormVectors v = norm_vectors(norm, i);
    const int64_t lanes = min64(FK_VL, n - i);
    vf y = normalized(v, load_lanes(raw + i, lanes)) * v.weight + v.bias;
    if (sums) store(sums + i, load(sums + i) + y);
    if (residual) y += load_lanes(residual + i, lanes);
    if (lanes < FK_VL)
      store_tail(out + i, y, lanes);
    else
      store(out + i, y);
  }
}

void batch_norm_rows(const struct fk_batch_norm_rows* p, int64_t task, void* scratch) {
  const int64_t image = task / p->tasks_per_image, first = task % p->tasks_per_image * p->rows_per_task;
  const int64_t rows = min64(p->rows_per_task, p->rows - first), n = p->columns;
  const int64_t start = (image * (p->skipped + p->rows) + p->skipped + first) * n;
  const float* raw = p->raw + (image * p->rows + first) * n;
  if (first == 0) write_prefix(p->residual, p->out, p->out_dtype, start - p->skipped * n, p->skipped * n);
  float* sums = p->means ? (float*)scratch : nullptr;
  if (sums) clear(sums, round_up(n, FK_VL));
  for (int64_t i = 0; i < rows; ++i)
    with_row(p->residual, p->out, p->out_dtype, start + i * n,
             [&](auto residual, auto out) { batch_norm_row(raw + i * n, n, p->norm, residual, out, sums); });
  for (int64_t i = 0; sums && i < n; ++i) p->means[task * n + i] = sums[i];
}

}  // namespace
