// LayerNorm, linear, activation, linear, residual for a block of rows: the hidden values live in the cache only.
#pragma once

#include "activations.h"
#include "rows.h"

namespace {

// Hidden channels computed at a time: their weights' panels stream through while the block's rows stay in L2.
constexpr int64_t kHiddenChunk = 256;

template <class A>
struct MlpScratch {
  A* normed;       // [rows][lda]
  A* hidden;       // [rows][ldh]
  float* sums;     // [rows][lds]
  char* prepared;  // of normed
  int64_t lda, ldh, lds, bytes;

  FK_INLINE MlpScratch layout(const struct fk_pointwise_mlp& p, void* base) {
    MlpScratch s;
    s.lda = round_up(p.channels, kPanel) + kRowPad;
    s.ldh = round_up(min64(kHiddenChunk, round_up(p.expand.n, kPanel)), kPanel) + kRowPad;
    s.lds = round_up(p.project.n, kPanel) + kRowPad;
    char* at = (char*)base;
    s.normed = (A*)at;
    at += round_up(p.rows_per_task * s.lda * (int64_t)sizeof(A), 64);
    s.hidden = (A*)at;
    at += round_up(p.rows_per_task * s.ldh * (int64_t)sizeof(A), 64);
    s.sums = (float*)at;
    at += round_up(p.rows_per_task * s.lds * 4, 64);
    s.prepared = at;
    at += prepared_bytes<A>(p.rows_per_task, p.channels);
    s.bytes = at - (char*)base;
    return s;
  }
};

template <class A, fk_activation Activation>
FK_INLINE void activate_tile(const float* tile, int64_t rows, const float* bias, A* out, int64_t ldo) {
  constexpr bool kLow = sizeof(A) == 2;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kPanel; j += FK_VL) {
      vf x = load(tile + i * kPanel + j) + load(bias + j);
      store(out + i * ldo + j, activate<kLow, Activation>(x));
    }
}

template <class A, fk_activation Activation>
static __attribute__((noinline)) void mlp_block(const struct fk_pointwise_mlp& p, int64_t first, int64_t rows,
                                                const MlpScratch<A>& s) {
  for (int64_t i = 0; i < rows; ++i)
    normalize_row(p.x, first + i, p.channels, round_up(p.channels, 2), p.norm, s.normed + i * s.lda);
  const int64_t depth = round_up(p.expand.k, kStep<A>);
  const int64_t hidden_panels = ceil_div(p.expand.n, kPanel), out_panels = ceil_div(p.project.n, kPanel);
  const int64_t chunk = kHiddenChunk / kPanel;
  const char* prepared = prepare(s.normed, s.lda, rows, depth, hidden_panels, s.prepared);
  for (int64_t h = 0; h < hidden_panels; h += chunk) {
    const int64_t h_end = min64(h + chunk, hidden_panels);
    const int64_t k_first = h * kPanel;
    // Hidden channels past the end are act(0) = 0 against no weights: the depth stops at the last real one.
    Panels<A> project = panels_of<A>(p.project, 0, out_panels, k_first, (h_end - h) * kPanel);
    project.after = (const A*)p.expand.panels + h_end % hidden_panels * depth * kPanel;
    product(
        s.normed, s.lda, rows, p.expand, h, h_end,
        [&](int64_t row, int64_t height, int64_t column, const float* tile) {
          activate_tile<A, Activation>(tile, height, p.expand.bias + column,
                                       s.hidden + row * s.ldh + column - h * kPanel, s.ldh);
        },
        INT64_MAX, 0, prepared, project.first);
    const bool last = h_end == hidden_panels;
    const auto add = [&](int64_t n, int64_t row, int64_t height, auto run) {
      float* sums = s.sums + row * s.lds + n * kPanel;
      run(sums, s.lds, h > 0, kPanel);
      if (last) write_tile(sums, s.lds, height, first + row, n * kPanel, p.project, p.out, p.out_dtype, p.residual);
    };
    each_tile<false>(s.hidden, s.ldh, rows, project, out_panels, nullptr, add);
  }
}

template <class A>
FK_INLINE void mlp_task(const struct fk_pointwise_mlp& p, int64_t task, void* scratch) {
  MlpScratch<A> s = MlpScratch<A>::layout(p, scratch);
  const int64_t first = task * p.rows_per_task, rows = min64(p.rows_per_task, p.rows - first);
  with_activation(p.activation, [&](auto activation) { mlp_block<A, activation.value>(p, first, rows, s); });
}

int64_t scratch_pointwise_mlp(const struct fk_pointwise_mlp* p) { return MlpScratch<float>::layout(*p, nullptr).bytes; }

void pointwise_mlp(const struct fk_pointwise_mlp* p, int64_t task, void* scratch) {
#if FK_NATIVE_BF16
  if (p->expand.low_precision) return mlp_task<bf16>(*p, task, scratch);
#endif
  mlp_task<float>(*p, task, scratch);
}

}  // namespace
