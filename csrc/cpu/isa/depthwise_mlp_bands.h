// The bands of rows that the backward of depthwise_mlp goes over, and what sums over a band's pixels reads.
#pragma once

#include "backward.h"

namespace {

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

FK_INLINE int64_t band_count(const struct fk_depthwise_mlp_backward& p, int64_t rows) {
  return ceil_div(rows, p.rows_per_band);
}
// Rows of a stack.
FK_INLINE BlockRange back_band(const struct fk_depthwise_mlp_backward& p, int64_t rows, int64_t band) {
  return {band * p.rows_per_band, min64(rows, (band + 1) * p.rows_per_band)};
}
// The band of what comes before the gradient of the hidden map: in one go it is ahead of the latter.
FK_INLINE BlockRange front_band(const struct fk_depthwise_mlp_backward& p, int64_t rows, int64_t band) {
  const BlockRange back = back_band(p, rows, band);
  if (p.stores) return back;
  return {band ? min64(rows, back.first + mlp_lead(p)) : 0, min64(rows, back.last + mlp_lead(p))};
}

// The band of the hidden map: ahead of what comes behind the filter by its reach.
FK_INLINE BlockRange hidden_band(const struct fk_depthwise_mlp_backward& p, int64_t rows, int64_t band) {
  const auto last = [&](int64_t of) { return min64(rows, front_band(p, rows, of).last + p.kernel / 2); };
  return {band ? last(band - 1) : 0, last(band)};
}

// The rows of a stack made ready for products with the weights of every chunk, band by band. bf16 meets so few panels
// at a time that it is read where it lies.
template <class A>
struct MlpReady {
  const A* rows;
  char* blocks;  // null: nothing is ready
  int64_t stride, k, panels, step;

  FK_INLINE MlpReady make(const struct fk_depthwise_mlp_backward& p, char** at, bool wanted, const A* rows,
                          int64_t stride, int64_t k) {
    MlpReady m = {rows, nullptr, stride, k, p.chunk / kPanel, 0};
    if (!wanted || sizeof(A) == 2 || !prepares<A>(m.panels, k)) return m;
    m.step = prepared_bytes<A>((p.rows_per_band + mlp_lead(p) + p.kernel / 2) * p.width, k);
    m.blocks = take<char>(at, band_count(p, p.stack * p.height) * m.step);
    return m;
  }
  FK_INLINE const char* of(const MlpReady& m, int64_t band) { return m.blocks ? m.blocks + band * m.step : nullptr; }
};
template <class A, class BandOf>
FK_INLINE void fill_ready(const struct fk_depthwise_mlp_backward& p, const MlpReady<A>& m, int64_t images,
                          BandOf band_of) {
  const int64_t height = images * p.height;
  for (int64_t band = 0; m.blocks && band < band_count(p, height); ++band) {
    const BlockRange rows = band_of(p, height, band);
    if (rows.first < rows.last)
      prepare(m.rows + rows.first * p.width * m.stride, m.stride, (rows.last - rows.first) * p.width, m.k, m.panels,
              m.blocks + band * m.step);
  }
}

// The rows of a stack as panels of products that sum over the pixels of a band: fp32 as it lies, bf16 in pairs. Where
// products are made in parts, and that pays, those of each band once for all chunks.
template <class A>
struct MlpPanels {
  const A* rows;
  A* pairs;     // [panels][depth][kPanel]
  char* parts;  // [bands][panels][deepest band]
  int64_t stride, depth, panels, parts_step;

  FK_INLINE MlpPanels make(const struct fk_depthwise_mlp_backward& p, char** at, bool wanted, const A* rows,
                           int64_t stride, int64_t columns) {
    const int64_t height = p.stack * p.height, pixels = height * p.width;
    MlpPanels m = {rows, nullptr, nullptr, stride, round_up(pixels, kStep<A>), columns / kPanel, 0};
    if (!wanted) return m;
    if (sizeof(A) == 2) m.pairs = take<A>(at, m.depth * columns);
#if FK_AMX
    if (sizeof(A) == 4 && p.project_back.parts && amx_pays(m.panels, mlp_band_pixels(p))) {
      m.parts_step = part_bytes(mlp_band_pixels(p));
      m.parts = take<char>(at, band_count(p, height) * m.panels * m.parts_step);
    }
#endif
    return m;
  }
  // Those of the pixels of a band.
  FK_INLINE Panels<A> of(const MlpPanels& m, int64_t band, int64_t first, int64_t pixels) {
    if (sizeof(A) == 2) return {m.pairs + first * kPanel, m.depth * kPanel, m.panels, round_up(pixels, 2), nullptr};
    const char* parts = m.parts ? m.parts + band * m.panels * m.parts_step : nullptr;
    return {m.rows + first * m.stride, kPanel, m.panels, pixels, nullptr, parts, m.parts_step, m.stride};
  }
};

// Fills in what panels of the stack's first `images` have besides its rows, for bands as `band_of` has them.
template <class A, class BandOf>
FK_INLINE void fill_panels(const struct fk_depthwise_mlp_backward& p, const MlpPanels<A>& m, int64_t images,
                           BandOf band_of) {
  const int64_t height = images * p.height;
  if (m.pairs) panels_of_rows(m.rows, m.stride, height * p.width, m.panels * kPanel, m.depth, m.pairs);
#if FK_AMX
  for (int64_t band = 0; m.parts && band < band_count(p, height); ++band) {
    const BlockRange rows = band_of(p, height, band);
    for (int64_t n = 0; n < m.panels; ++n)
      amx_panel_blocks((const float*)m.rows + rows.first * p.width * m.stride + n * kPanel, m.stride,
                       (rows.last - rows.first) * p.width, m.parts + (band * m.panels + n) * m.parts_step);
  }
#else
  (void)band_of;
#endif
}

}  // namespace
