// The tile product: rows of A (in scratch or straight from a tensor) times one packed panel, accumulated in fp32.
#pragma once

#include "panels.h"

namespace {

// A running fp32 sum longer than the one is cut into partial sums of the other: its rounding error grows with its
// length.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr int64_t kLongestSum = 512, kPartialSum = 128;
#else  // two roundings for one
constexpr int64_t kLongestSum = 64, kPartialSum = 64;
#endif

// Weights are read once per block of rows and mostly come from beyond L2: while a tile is computed, its share of the
// panel that comes next is fetched, `step` bytes per value of K.
struct Ahead {
  const char* at;
  int64_t step;
};

// The sums of a tile. Loops over them are unrolled at once: else the compiler keeps them on the stack.
template <int MR, int NV>
FK_INLINE void clear_sums(vf (&c)[MR][NV]) {
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) c[i][j] = splat(0.0f);
}
template <int MR, int NV>
FK_INLINE void store_sums(const vf (&c)[MR][NV], float* out, int64_t ldo, bool accumulate) {
  if (accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* to = out + i * ldo + j * FK_VL;
        store(to, load(to) + c[i][j]);
      }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) store(out + i * ldo + j * FK_VL, c[i][j]);
  }
}

// out[MR][kPanel] (+)= A[MR][k] * panel[k][kPanel], of which the first NV vectors are computed. `a` is row-major with
// `lda` between rows; with `Transposed` it is column-major with `lda` between values of K. The panel's rows are `ldb`
// apart.
template <int MR, bool Transposed, int NV>
static __attribute__((noinline)) void tile_product(const float* a, int64_t lda, const float* panel, int64_t ldb,
                                                   int64_t k, float* out, int64_t ldo, bool accumulate, Ahead ahead) {
  vf c[MR][NV];
  clear_sums(c);
  const float* row[5];
  for (int i = 0; i < (MR + 2) / 3; ++i) row[i] = a + 3 * i * lda;
  for (int64_t p = 0; p < k; ++p) {
    __builtin_prefetch(ahead.at + p * ahead.step, 0, 2);
    vf b[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) b[j] = load(panel + p * ldb + j * FK_VL);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      vf x = splat(Transposed ? a[p * lda + i] : row[i / 3][(i % 3) * lda + p]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) c[i][j] += x * b[j];
    }
  }
  store_sums(c, out, ldo, accumulate);
}

#if FK_NATIVE_BF16 && !FK_AMX
// The same on bf16 pairs: panel[k / 2][ldb][2]; k is even. A transposed operand is packed as [k / 2][lda / 2][2].
template <int MR, bool Transposed, int NV>
static __attribute__((noinline)) void tile_product(const bf16* a, int64_t lda, const bf16* panel, int64_t ldb,
                                                   int64_t k, float* out, int64_t ldo, bool accumulate, Ahead ahead) {
  vf c[MR][NV];
  clear_sums(c);
  const bf16* row[5];
  for (int i = 0; i < (MR + 2) / 3; ++i) row[i] = a + 3 * i * lda;
  for (int64_t p = 0; p < k; p += 2) {
    __builtin_prefetch(ahead.at + p * ahead.step, 0, 2);
    __m512i b[NV];
    for (int j = 0; j < NV; ++j) b[j] = _mm512_loadu_si512(panel + p * ldb + j * FK_VL * 2);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, Transposed ? a + (p / 2) * lda + 2 * i : row[i / 3] + (i % 3) * lda + p, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) c[i][j] = (vf)_mm512_dpbf16_ps((__m512)c[i][j], x, (__m512bh)b[j]);
    }
  }
  store_sums(c, out, ldo, accumulate);
}
#endif

template <class A, bool Transposed, int MR, int NV>
struct TileProducts {
  FK_INLINE void run(int64_t rows, const A* a, int64_t lda, const A* panel, int64_t ldb, int64_t k, float* out,
                     int64_t ldo, bool accumulate, Ahead ahead) {
    if (rows == MR) return tile_product<MR, Transposed, NV>(a, lda, panel, ldb, k, out, ldo, accumulate, ahead);
    TileProducts<A, Transposed, MR - 1, NV>::run(rows, a, lda, panel, ldb, k, out, ldo, accumulate, ahead);
  }
};
template <class A, bool Transposed, int NV>
struct TileProducts<A, Transposed, 0, NV> {
  FK_INLINE void run(int64_t, const A*, int64_t, const A*, int64_t, int64_t, float*, int64_t, bool, Ahead) {}
};

// Of the panel's columns the first `width` are wanted; others may be left as they were.
template <bool Transposed = false, class A>
FK_INLINE void tile(int64_t rows, const A* a, int64_t lda, const A* panel, int64_t ldb, int64_t k, float* out,
                    int64_t ldo, bool accumulate, Ahead ahead, int64_t width) {
  const int64_t step = k <= kLongestSum ? k : kPartialSum;
  for (int64_t p = 0; p < k; p += step) {
    const Ahead rest = {ahead.at + p * ahead.step, ahead.step};
    const A* from = a + (Transposed ? p / kStep<A> * lda : p);
    const int64_t depth = min64(step, k - p);
    if (width > kPanel - FK_VL)
      TileProducts<A, Transposed, kVectorRows, FK_NV>::run(rows, from, lda, panel + p * ldb, ldb, depth, out, ldo,
                                                           accumulate || p > 0, rest);
    else
      TileProducts<A, Transposed, kVectorRows, FK_NV - 1>::run(rows, from, lda, panel + p * ldb, ldb, depth, out, ldo,
                                                               accumulate || p > 0, rest);
  }
}

}  // namespace

#if FK_AMX
#include "amx.h"
#endif

namespace {

// Rows are cut into tiles of nearly equal height: a tile of one or two rows would wait on the latency of its few sums.
struct RowTiles {
  int64_t count, base, longer;
};
FK_INLINE RowTiles row_tiles(int64_t rows) {
  const int64_t count = ceil_div(rows, kVectorRows);
  RowTiles t = {count, count ? rows / count : 0, count ? rows % count : 0};
  return t;
}
FK_INLINE int64_t tile_start(const RowTiles& t, int64_t i) { return i * t.base + min64(i, t.longer); }
FK_INLINE int64_t tile_height(const RowTiles& t, int64_t i) { return t.base + (i < t.longer ? 1 : 0); }

// The share of tile `t` in fetching the panel at `next`, k values deep.
template <class A>
FK_INLINE Ahead fetch_ahead(const A* next, int64_t k, const RowTiles& tiles, int64_t t) {
  const int64_t step = kPanel * (int64_t)sizeof(A) / tiles.count;
  Ahead ahead = {(const char*)next + t * k * step, step};
  return ahead;
}

// The tiles of A times panels on vectors.
template <bool Transposed, class A, class Body>
FK_INLINE void vector_each_tile(const A* a, int64_t lda, int64_t rows, const Panels<A>& w, Body body) {
  const RowTiles tiles = row_tiles(rows);
  for (int64_t n = 0; n < w.count; ++n) {
    const A* panel = w.first + n * w.step;
    const A* next = n + 1 < w.count ? panel + w.step : w.after;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = tile_start(tiles, t), height = tile_height(tiles, t);
      const Ahead nothing = {(const char*)panel, 0};
      const Ahead ahead = w.after ? fetch_ahead(next, w.k, tiles, t) : nothing;
      body(n, row, height, [&](float* out, int64_t ldo, bool accumulate, int64_t width) {
        tile<Transposed>(height, a + row * (Transposed ? kStep<A> : lda), lda, panel, w.row, w.k, out, ldo, accumulate,
                         ahead, width);
      });
    }
  }
}

// Bytes of a panel in parts, `k` values deep; none without parts.
FK_INLINE int64_t part_bytes(int64_t k) {
#if FK_AMX
  return ceil_div(k, kAmxDepth) * kAmxPanelBlock;
#else
  (void)k;
  return 0;
#endif
}

// Rows of A that several products meet can be made ready for them once: `prepared_bytes` of memory at 64 bytes, for all
// the panels that they will meet. Null where products take rows as they are.
template <class A>
FK_INLINE int64_t prepared_bytes(int64_t rows, int64_t k) {
#if FK_AMX
  return ceil_div(rows, kAmxRows) * ceil_div(k, kAmxDepth) * kAmxRowBlock<A>;
#else
  (void)rows, (void)k;
  return 0;
#endif
}
template <class A>
FK_INLINE bool prepares(int64_t panels, int64_t k) {
#if FK_AMX
  return sizeof(A) == 2 || amx_pays(panels, k);
#else
  (void)panels, (void)k;
  return false;
#endif
}
template <class A>
FK_INLINE const char* prepare(const A* a, int64_t lda, int64_t rows, int64_t k, int64_t panels, char* memory) {
  if (!prepares<A>(panels, k)) return nullptr;
#if FK_AMX
  amx_blocks<false>(a, lda, 0, rows, rows, k, memory);
#else
  (void)a, (void)lda, (void)rows;
#endif
  return memory;
}

// The tiles of A times panels, each seen by `body(panel, row, rows, run)`, where run(out, ldo, accumulate, width)
// computes it: of its columns the first `width` are wanted. Neither rows nor panels may decide how fp32 is computed
// where they depend on the number of threads: `counted` are the panels of all threads; 0, and no parts, where rows are
// always few or `prepare` has decided.
template <bool Transposed, class A, class Body>
FK_INLINE void each_tile(const A* a, int64_t lda, int64_t rows, const Panels<A>& w, int64_t counted,
                         const char* prepared, Body body) {
#if FK_AMX
  if (sizeof(A) == 2 || prepared || amx_pays(counted, w.k))
    return amx_each_tile<Transposed>(a, lda, rows, w, prepared, body);
#endif
  (void)counted, (void)prepared;
  if constexpr (sizeof(A) == 4 || !FK_AMX) vector_each_tile<Transposed>(a, lda, rows, w, body);
}

// Panel n's tiles go to the rows of `out` from column n * out_step on, or are added there. Of all columns the first
// `width` are wanted.
template <bool Transposed = false, class A>
FK_INLINE void products(const A* a, int64_t lda, int64_t rows, const Panels<A>& w, float* out, int64_t ldo,
                        int64_t out_step, bool accumulate, int64_t width = INT64_MAX) {
  each_tile<Transposed>(a, lda, rows, w, w.count, nullptr, [&](int64_t n, int64_t row, int64_t, auto run) {
    run(out + row * ldo + n * out_step, ldo, accumulate, width - n * kPanel);
  });
}

// Panels [first, last) of a weight, and of their values of K at most `k` from the `from`-th on, which is a multiple of
// kPanel.
template <class A>
FK_INLINE Panels<A> panels_of(const struct fk_linear& w, int64_t first, int64_t last, int64_t from = 0,
                              int64_t k = INT64_MAX) {
  const int64_t depth = round_up(w.k, kStep<A>), step = depth * kPanel;
  Panels<A> p = {(const A*)w.panels + first * step + from * kPanel, step, last - first, min64(k, depth - from),
                 nullptr};
  p.parts_step = part_bytes(w.k);
  if (w.parts) p.parts = (const char*)w.parts + first * p.parts_step + part_bytes(from);
  return p;
}

// Rows times panels; `epilogue(row, rows, column, tile)` sees each finished tile [rows][kPanel]. The first panel's
// columns begin with `column`; those from `width` on may be anything finite.
template <class A, class Epilogue>
FK_INLINE void product(const A* a, int64_t lda, int64_t rows, const Panels<A>& w, int64_t column, Epilogue epilogue,
                       int64_t width, int64_t counted, const char* prepared) {
  float out[kTileRows * kPanel] __attribute__((aligned(64)));
  if (width < column + w.count * kPanel)
    for (int i = 0; i < kTileRows * kPanel; i += FK_VL) store(out + i, splat(0.0f));
  each_tile<false>(a, lda, rows, w, counted, prepared, [&](int64_t n, int64_t row, int64_t height, auto run) {
    run(out, kPanel, false, width - column - n * kPanel);
    epilogue(row, height, column + n * kPanel, out);
  });
}
// Rows times panels [first, last) of a weight. `after` is what will be read next; nothing else known, they are read
// again.
template <class A, class Epilogue>
FK_INLINE void product(const A* a, int64_t lda, int64_t rows, const struct fk_linear& w, int64_t first, int64_t last,
                       Epilogue epilogue, int64_t width, int64_t counted, const char* prepared = nullptr,
                       const void* after = nullptr) {
  Panels<A> panels = panels_of<A>(w, first, last);
  panels.after = after ? (const A*)after : panels.first;
  product(a, lda, rows, panels, first * kPanel, epilogue, width, counted, prepared);
}
template <class A, class Epilogue>
FK_INLINE void product(const A* a, int64_t lda, int64_t rows, const struct fk_linear& w, int64_t first, int64_t last,
                       Epilogue epilogue, int64_t width = INT64_MAX) {
  product(a, lda, rows, w, first, last, epilogue, width, last - first);
}

// Write a finished tile to a row-major tensor: bias, optional residual, conversion; columns past n are dropped.
template <class Out, class Residual>
FK_INLINE void write_tile(const float* tile, int64_t ldt, int64_t rows, int64_t column, const struct fk_linear& w,
                          Out* out, const Residual* residual) {
  const int64_t width = min64(kPanel, w.n - column);
  for (int64_t i = 0; i < rows; ++i) {
    Out* to = out + i * w.n + column;
    const Residual* from = residual ? residual + i * w.n + column : nullptr;
    for (int64_t j = 0; j < width; j += FK_VL) {
      vf y = load(tile + i * ldt + j) + load(w.bias + column + j);
      if (j + FK_VL <= width) {
        if (from) y += load(from + j);
        store(to + j, y);
      } else {
        if (from) y += load_tail(from + j, width - j);
        store_tail(to + j, y, width - j);
      }
    }
  }
}

template <class Out>
FK_INLINE void write_tile(const float* tile, int64_t ldt, int64_t rows, int64_t row, int64_t column,
                          const struct fk_linear& w, Out* out, const struct fk_array& residual) {
  if (!residual.data)
    write_tile<Out, float>(tile, ldt, rows, column, w, out + row * w.n, nullptr);
  else if (residual.dtype == FK_F32)
    write_tile(tile, ldt, rows, column, w, out + row * w.n, (const float*)residual.data + row * w.n);
  else
    write_tile(tile, ldt, rows, column, w, out + row * w.n, (const bf16*)residual.data + row * w.n);
}

// `row` is counted from the start of `out` and of `residual`.
FK_INLINE void write_tile(const float* tile, int64_t ldt, int64_t rows, int64_t row, int64_t column,
                          const struct fk_linear& w, void* out, fk_dtype dtype, const struct fk_array& residual) {
  if (dtype == FK_F32)
    write_tile(tile, ldt, rows, row, column, w, (float*)out, residual);
  else
    write_tile(tile, ldt, rows, row, column, w, (bf16*)out, residual);
}

}  // namespace
