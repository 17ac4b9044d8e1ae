// Products in the tile registers of AMX, which take bf16 and add in fp32. gemm.h includes this where the instruction
// set has them.
#pragma once

#include "panels.h"
#ifdef FK_AMX_REGISTERS  // a test's, which need no such processor
#include FK_AMX_REGISTERS
#else
#include "amx_registers.h"
#endif

namespace {

// A tile register holds 16 rows of 64 bytes: a block of A of 16 rows and 32 values of K, a block of a panel of 16 pairs
// of values of K and 16 columns, or 16 x 16 sums. Loading other shapes takes as long as 16 products, so all are whole:
// what is smaller is copied into blocks filled up with zeros.
constexpr int64_t kAmxRows = 16, kAmxDepth = 32;
constexpr int64_t kAmxBlock = kAmxRows * kAmxDepth * 2;  // bytes
static_assert(FK_VL == 16 && FK_NV == 2, "");

// to[c][r] = from[r][c] for 16 x 16 words, of which the first `rows` rows and `columns` columns are read; the other
// rows are taken for zeros.
FK_INLINE void transpose16(const uint32_t* from, int64_t stride, int64_t rows, int64_t columns, uint32_t* to) {
  const __mmask16 mask = (__mmask16)lanes_mask(columns);
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    a[i] = i < rows ? _mm512_maskz_loadu_epi32(mask, from + i * stride) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Now a[4 i + j] holds, in its quarter q, column 4 q + j of rows [4 i, 4 i + 4).
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88),
                  high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_store_si512(to + j * 16, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_store_si512(to + (8 + j) * 16, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_store_si512(to + (4 + j) * 16, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_store_si512(to + (12 + j) * 16, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

// A block of A, zeros where it has no values: rows of 64 bytes. Rows from `rows` on are left as they were: nobody wants
// their sums.
template <bool Transposed>
FK_INLINE void amx_block(const bf16* a, int64_t lda, int64_t rows, int64_t depth, char* block) {
  if (Transposed) return transpose16((const uint32_t*)a, lda / 2, depth / 2, rows, (uint32_t*)block);
  const __mmask16 mask = (__mmask16)lanes_mask(depth / 2);
  for (int64_t i = 0; i < rows; ++i) _mm512_store_si512(block + i * 64, _mm512_maskz_loadu_epi32(mask, a + i * lda));
}

// A block of a panel, as A's.
FK_INLINE void amx_panel_block(const bf16* panel, int64_t depth, char* block) {
  for (int64_t i = 0; i < kAmxDepth; ++i)
    _mm512_store_si512(block + i * 64,
                       i < depth ? _mm512_loadu_si512((const char*)panel + i * 64) : _mm512_setzero_si512());
}

// Blocks along K: `count` of them `step` bytes apart with rows of `stride` bytes, then perhaps a last one in rows of 64
// bytes (of a panel: as in a panel).
struct AmxOperand {
  const char* blocks;
  int64_t stride, step, count;
  const char* last;
};

// sums[16][kPanel], of which the first NV vectors are computed.
template <int NV>
static __attribute__((noinline)) void amx_sums(const AmxOperand& a, const AmxOperand& panel, float* sums, int64_t ldo) {
  amx_clear<0>();
  if (NV == 2) amx_clear<1>();
  const char *rows = a.blocks, *columns = panel.blocks;
  for (int64_t i = 0; i < a.count; ++i, rows += a.step, columns += panel.step) {
    amx_load<4>(rows, a.stride);
    amx_load<5>(columns, panel.stride);
    amx_multiply<0, 4, 5>();
    if (NV == 2) {
      amx_load<6>(columns + 64, panel.stride);
      amx_multiply<1, 4, 6>();
    }
  }
  if (a.last) {
    amx_load<4>(a.last, 64);
    amx_load<5>(panel.last, kPanel * 4);
    amx_multiply<0, 4, 5>();
    if (NV == 2) {
      amx_load<6>(panel.last + 64, kPanel * 4);
      amx_multiply<1, 4, 6>();
    }
  }
  amx_store<0>(sums, ldo * 4);
  if (NV == 2) amx_store<1>(sums + FK_VL, ldo * 4);
}

// Of a tile in a buffer of whole ones the rows and vectors that are wanted.
FK_INLINE void place_tile(const float* sums, int64_t rows, int64_t width, float* out, int64_t ldo, bool accumulate) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < min64(width, kPanel); j += FK_VL) {
      float* to = out + i * ldo + j;
      const vf x = load(sums + i * kPanel + j);
      store(to, accumulate ? load(to) + x : x);
    }
}

// Bytes of blocks of A that stay in L2.
constexpr int64_t kAmxGroup = 768 << 10;

// each_tile on tile registers. Rows of A that meet few panels are read where they lie, except for what is no whole
// block.
template <bool Transposed, class Body>
FK_INLINE void amx_each_tile(const bf16* a, int64_t lda, int64_t rows, const Panels<bf16>& w, Body body) {
  constexpr int64_t kFewPanels = 3, panel_block = 2 * kAmxBlock;
  const bool direct = !Transposed && w.count <= kFewPanels;
  const int64_t blocks = ceil_div(w.k, kAmxDepth), whole = w.k / kAmxDepth, tiles = ceil_div(rows, kAmxRows);
  const int64_t group = direct ? tiles : min64(tiles, max64(1, kAmxGroup / (blocks * kAmxBlock)));
  char* const rest = (char*)fk_block_memory(panel_block + group * blocks * kAmxBlock);
  char* const a_blocks = rest + panel_block;
  const int64_t fetched = w.after ? w.k * kPanel * (int64_t)sizeof(bf16) : 0;
  for (int64_t begin = 0; begin < tiles; begin += group) {
    const int64_t end = min64(begin + group, tiles), share = ceil_div(fetched, end - begin);
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = direct && rows - t * kAmxRows >= kAmxRows ? whole : 0; i < blocks; ++i)
        amx_block<Transposed>(
            a + (Transposed ? i * kAmxDepth / 2 * lda + t * kAmxRows * 2 : t * kAmxRows * lda + i * kAmxDepth), lda,
            min64(kAmxRows, rows - t * kAmxRows), min64(kAmxDepth, w.k - i * kAmxDepth),
            a_blocks + ((t - begin) * blocks + i) * kAmxBlock);
    for (int64_t n = 0; n < w.count; ++n) {
      const bf16* panel = w.first + n * w.step;
      const char* next = (const char*)(n + 1 < w.count ? panel + w.step : w.after);
      if (whole < blocks) amx_panel_block(panel + whole * kAmxDepth * kPanel, w.k - whole * kAmxDepth, rest);
      const AmxOperand right = {(const char*)panel, kPanel * 4, panel_block, whole, rest};
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t * kAmxRows, height = min64(kAmxRows, rows - row);
        const char* own = a_blocks + (t - begin) * blocks * kAmxBlock;
        AmxOperand left = {own, 64, kAmxBlock, whole, whole < blocks ? own + whole * kAmxBlock : nullptr};
        if (direct && height == kAmxRows) {
          left.blocks = (const char*)(a + row * lda);
          left.stride = lda * 2;
          left.step = kAmxDepth * 2;
        }
        for (int64_t i = (t - begin) * share; i < min64((t - begin + 1) * share, fetched); i += 64)
          __builtin_prefetch(next + i, 0, 2);
        body(n, row, height, [&](float* out, int64_t ldo, bool accumulate, int64_t width) {
          float sums[kAmxRows * kPanel] __attribute__((aligned(64)));
          const bool at_once = height == kAmxRows && !accumulate;
          float* to = at_once ? out : sums;
          if (width > kPanel - FK_VL)
            amx_sums<FK_NV>(left, right, to, at_once ? ldo : kPanel);
          else
            amx_sums<FK_NV - 1>(left, right, to, at_once ? ldo : kPanel);
          if (!at_once) place_tile(sums, height, width, out, ldo, accumulate);
        });
      }
    }
  }
}

}  // namespace
