// A strided dense convolution over an NHWC map as a product, with LayerNorm on the way out.
#pragma once

#include "activations.h"
#include "rows.h"

namespace {

// Pixels of fewer channels than a vector has lanes are put side by side first.
constexpr int64_t kFewChannels = 16;

// Whether the rows of the map are made ready, with their padding, before neighbourhoods are gathered from them: an
// affine runs over whole rows, a norm once over pixels that several neighbourhoods share, and copies need no look at
// borders.
FK_INLINE bool has_window(const struct fk_patch_embedding& p) {
  if (p.in_norm.kind == FK_AFFINE) return true;
  return p.kernel > 1 && (p.channels < kFewChannels || (p.kernel > p.stride && p.in_norm.kind != FK_NO_NORM));
}

// Whether the product reads the map where it lies. Rows a multiple of this apart would share cache sets.
constexpr int64_t kSetBytes = 1024;
template <class A>
FK_INLINE bool reads_map(const struct fk_patch_embedding& p) {
  return p.kernel == 1 && p.stride == 1 && p.padding == 0 && p.in_norm.kind == FK_NO_NORM &&
         sizeof(A) == (p.x.dtype == FK_F32 ? 4 : 2) && p.channels % kStep<A> == 0 &&
         p.channels * (int64_t)sizeof(A) % kSetBytes != 0;
}

template <class A>
struct EmbeddingScratch {
  A* rows;               // [rows][lda]: the k x k x C neighbourhood of each output pixel
  float* out;            // [rows][ldo], where a norm waits for whole rows
  A* window;             // [kernel][ldw]: row y of the padded map in place y % kernel
  int64_t* held;         // [kernel]: which y
  float *scale, *shift;  // of the affine, repeated to whole vectors [C * FK_VL]
  int64_t lda, ldo, ldw, bytes;

  FK_INLINE EmbeddingScratch layout(const struct fk_patch_embedding& p, void* base) {
    EmbeddingScratch s = {};
    s.lda = round_up(p.linear.k, 2) + kRowPad;
    s.ldo = round_up(p.linear.n, kPanel) + kRowPad;
    int64_t at = 0;
    const auto take = [&](int64_t bytes) {
      char* found = (char*)base + at;
      at += round_up(bytes, 64);
      return found;
    };
    if (!reads_map<A>(p)) s.rows = (A*)take(p.rows_per_task * s.lda * (int64_t)sizeof(A));
    if (p.norm.kind != FK_NO_NORM) s.out = (float*)take(p.rows_per_task * s.ldo * 4);
    if (has_window(p)) {
      const int64_t pixels = (min64(p.rows_per_task, p.out_w) - 1) * p.stride + p.kernel;
      s.ldw = pixels * p.channels + FK_VL;  // copies of whole vectors read past the end
      s.window = (A*)take(p.kernel * s.ldw * (int64_t)sizeof(A));
      s.held = (int64_t*)take(p.kernel * 8);
      if (p.in_norm.kind == FK_AFFINE) {
        s.scale = (float*)take(p.channels * FK_VL * 4);
        s.shift = (float*)take(p.channels * FK_VL * 4);
      }
    }
    s.bytes = at;
    return s;
  }
};

template <class T, class A>
FK_INLINE void gather_neighbourhood(const struct fk_patch_embedding& p, int64_t pixel, A* to, int64_t padded) {
  const int64_t ox = pixel % p.out_w, oy = pixel / p.out_w % p.out_h, image = pixel / p.out_w / p.out_h;
  const int64_t left = ox * p.stride - p.padding, top = oy * p.stride - p.padding;
  // A neighbourhood that lies wholly beside the map has no pixels in it.
  const int64_t from_x = min64(max64(left, 0), left + p.kernel), to_x = max64(from_x, min64(left + p.kernel, p.width));
  const int64_t line = p.kernel * p.channels;
  const T* x = (const T*)p.x.data + image * p.height * p.width * p.channels;
  for (int64_t ky = 0; ky < p.kernel; ++ky, to += line) {
    const int64_t y = top + ky;
    if (y < 0 || y >= p.height) {
      copy_row(x, 0, line, to);
      continue;
    }
    const int64_t skipped = (from_x - left) * p.channels, present = (to_x - from_x) * p.channels;
    copy_row(x, 0, skipped, to);
    const T* from = x + (y * p.width + from_x) * p.channels;
    if (p.in_norm.kind == FK_NO_NORM) {
      copy_row(from, present, line - skipped, to + skipped);
      continue;
    }
    for (int64_t at = 0; at < present; at += p.channels)
      normalize_row(from + at, p.channels, p.channels, p.in_norm, to + skipped + at);
    copy_row(x, 0, line - skipped - present, to + skipped + present);
  }
  copy_row(x, 0, padded - p.linear.k, to);
}

// Scale and shift of each channel, over vectors that begin at channel 0 whenever C of them have passed.
template <class T, class A>
FK_INLINE void affine_pixels(const T* x, int64_t n, int64_t channels, const float* scale, const float* shift, A* out) {
  int64_t vector = 0, i = 0;
  for (; i + FK_VL <= n; i += FK_VL) {
    store(out + i, load(x + i) * load(scale + vector * FK_VL) + load(shift + vector * FK_VL));
    if (++vector == channels) vector = 0;
  }
  for (int64_t at = vector * FK_VL; i < n; ++i, ++at) from_float(out + i, to_float(x[i]) * scale[at] + shift[at]);
}

// `pixels` pixels of row y of an image from column `left` on, maybe beside the map, where they are zeros.
template <class T, class A>
FK_INLINE void fill_window_row(const struct fk_patch_embedding& p, const EmbeddingScratch<A>& s, int64_t image,
                               int64_t y, int64_t left, int64_t pixels, A* to) {
  const int64_t c = p.channels;
  const bool inside = y >= 0 && y < p.height;
  const int64_t from_x = min64(max64(left, 0), left + pixels);
  const int64_t to_x = inside ? max64(from_x, min64(left + pixels, p.width)) : from_x;
  const int64_t skipped = (from_x - left) * c, present = (to_x - from_x) * c;
  copy_row(to, 0, skipped, to);
  copy_row(to, 0, pixels * c - skipped - present, to + skipped + present);
  if (present == 0) return;
  to += skipped;
  const T* x = (const T*)p.x.data + ((image * p.height + y) * p.width + from_x) * c;
  if (p.in_norm.kind == FK_NO_NORM) return copy_row(x, present, present, to);
  if (p.in_norm.kind == FK_AFFINE) return affine_pixels(x, present, c, s.scale, s.shift, to);
  for (int64_t at = 0; at < present; at += c) normalize_row(x + at, c, c, p.in_norm, to + at);
}

// Whole vectors: what is too many is overwritten, or lies in the row's padding.
FK_INLINE void copy_vectors(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += FK_VL) store(to + i, load(from + i));
}
FK_INLINE void copy_vectors(const bf16* from, int64_t n, bf16* to) {
  for (int64_t i = 0; i < n; i += FK_VL) *(vh*)(to + i) = *(const vh*)(from + i);
}

// The neighbourhoods of `rows` output pixels from `first` on, a row of the result at a time.
template <class T, class A>
FK_INLINE void gather_from_window(const struct fk_patch_embedding& p, const EmbeddingScratch<A>& s, int64_t first,
                                  int64_t rows) {
  const int64_t line = p.kernel * p.channels, step = p.stride * p.channels;
  if (s.scale)
    for (int64_t i = 0; i < p.channels * FK_VL; ++i) {
      s.scale[i] = p.in_norm.weight[i % p.channels];
      s.shift[i] = p.in_norm.bias[i % p.channels];
    }
  int64_t width = 0;
  bool whole = false;
  for (int64_t done = 0; done < rows; done += width) {
    const int64_t pixel = first + done, ox = pixel % p.out_w, oy = pixel / p.out_w % p.out_h;
    const int64_t image = pixel / p.out_w / p.out_h, left = ox * p.stride - p.padding;
    width = min64(rows - done, p.out_w - ox);
    // Rows that whole rows of an image's result share stay in the window.
    const bool goes_on = whole && width == p.out_w && oy > 0;
    whole = width == p.out_w;
    if (!goes_on)
      for (int64_t place = 0; place < p.kernel; ++place) s.held[place] = -1;
    A* to = s.rows + done * s.lda;
    for (int64_t ky = 0; ky < p.kernel; ++ky) {
      const int64_t padded_y = oy * p.stride + ky, place = padded_y % p.kernel;
      A* row = s.window + place * s.ldw;
      if (s.held[place] != padded_y)
        fill_window_row<T>(p, s, image, padded_y - p.padding, left, (width - 1) * p.stride + p.kernel, row);
      s.held[place] = padded_y;
      for (int64_t i = 0; i < width; ++i) copy_vectors(row + i * step, line, to + i * s.lda + ky * line);
    }
    if (p.linear.k % 2)
      for (int64_t i = 0; i < width; ++i) from_float(to + i * s.lda + p.linear.k, 0.0f);
  }
}

// A finished tile: bias, activation, affine.
template <class A, fk_activation Activation, class Out>
FK_INLINE void place_result(const struct fk_patch_embedding& p, const float* tile, int64_t height, int64_t column,
                            Out* out, int64_t ldo) {
  const int64_t width = min64(kPanel, p.linear.n - column);
  for (int64_t j = 0; j < width; j += FK_VL) {
    const vf bias = load(p.linear.bias + column + j);
    const vf scale = p.scale ? load(p.scale + column + j) : splat(1.0f);
    const vf shift = p.scale ? load(p.shift + column + j) : splat(0.0f);
    for (int64_t i = 0; i < height; ++i) {
      vf y = activate<sizeof(A) == 2, Activation>(load(tile + i * kPanel + j) + bias);
      if (p.scale) y = y * scale + shift;
      if (width - j >= FK_VL)
        store(out + i * ldo + j, y);
      else
        store_tail(out + i * ldo + j, y, width - j);
    }
  }
}

template <class T, class A>
FK_INLINE void gather_rows(const struct fk_patch_embedding& p, const EmbeddingScratch<A>& s, int64_t first,
                           int64_t rows) {
  if (has_window(p)) return gather_from_window<T>(p, s, first, rows);
  const int64_t padded = round_up(p.linear.k, 2);
  for (int64_t i = 0; i < rows; ++i) gather_neighbourhood<T>(p, first + i, s.rows + i * s.lda, padded);
}

template <class A, class Out>
FK_INLINE void embed_rows(const struct fk_patch_embedding& p, const A* a, int64_t lda, int64_t rows, int64_t group,
                          Out* out, int64_t ldo) {
  const int64_t begin = group * p.panels_per_task;
  const int64_t all = ceil_div(p.linear.n, kPanel), end = min64(begin + p.panels_per_task, all);
  const int64_t counted = p.batch * p.out_h * p.out_w <= kTileRows ? 0 : all;
  with_activation(p.activation, [&](auto activation) {
    product(
        a, lda, rows, p.linear, begin, end,
        [&](int64_t row, int64_t height, int64_t column, const float* tile) {
          place_result<A, activation.value>(p, tile, height, column, out + row * ldo + column, ldo);
        },
        INT64_MAX, counted);
  });
}

template <class A, class Out>
FK_INLINE void embed_rows(const struct fk_patch_embedding& p, const EmbeddingScratch<A>& s, const A* a, int64_t lda,
                          int64_t rows, int64_t group, Out* out) {
  const int64_t n = p.linear.n;
  if (p.norm.kind == FK_NO_NORM) return embed_rows(p, a, lda, rows, group, out, n);
  embed_rows(p, a, lda, rows, group, s.out, s.ldo);
  for (int64_t i = 0; i < rows; ++i) normalize_row(s.out + i * s.ldo, n, n, p.norm, out + i * n);
}

template <class A>
FK_INLINE void embedding_task(const struct fk_patch_embedding& p, int64_t task, void* scratch) {
  const EmbeddingScratch<A> s = EmbeddingScratch<A>::layout(p, scratch);
  const int64_t first = task / p.panel_groups * p.rows_per_task, group = task % p.panel_groups;
  const int64_t rows = min64(p.rows_per_task, p.batch * p.out_h * p.out_w - first);
  const A* a = s.rows;
  int64_t lda = s.lda;
  if (reads_map<A>(p)) {
    a = (const A*)p.x.data + first * p.channels;
    lda = p.channels;
  } else if (p.x.dtype == FK_F32) {
    gather_rows<float>(p, s, first, rows);
  } else {
    gather_rows<bf16>(p, s, first, rows);
  }
  if (p.out_dtype == FK_F32)
    embed_rows(p, s, a, lda, rows, group, (float*)p.out + first * p.linear.n);
  else
    embed_rows(p, s, a, lda, rows, group, (bf16*)p.out + first * p.linear.n);
}

int64_t scratch_patch_embedding(const struct fk_patch_embedding* p) {
#if FK_NATIVE_BF16
  if (p->linear.low_precision) return EmbeddingScratch<bf16>::layout(*p, nullptr).bytes;
#endif
  return EmbeddingScratch<float>::layout(*p, nullptr).bytes;
}

void patch_embedding(const struct fk_patch_embedding* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->linear.low_precision) return embedding_task<bf16>(*p, task, scratch);
#endif
  embedding_task<float>(*p, task, scratch);
}

}  // namespace
