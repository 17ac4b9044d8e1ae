// Products in the tile registers of AMX, which take bf16 and add in fp32. gemm.h includes this where the instruction
// set has them.
//
// fp32 goes through them in three parts: a number is the sum of three bf16, and of the nine products of parts the six
// above fp32's own rounding are added up. AMX takes numbers below 2^-126 for zeros, parts and sums alike, and large
// ones round up to infinity: rows with sums that show it are computed with vectors. (Some do not: those of rows all
// below 2^-109, whose last parts are zeros, if weights above 2^13 lift them over 2^-96; and zeros.) At best that is 2.6
// times the rate of the vectors' multiply-adds.
#pragma once

#include "panels.h"
#include "transpose.h"
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

// A block of A, zeros where it has no values: rows of 64 bytes. Rows from `rows` on are left as they were: nobody wants
// their sums.
template <bool Transposed>
FK_INLINE void amx_block(const bf16* a, int64_t lda, int64_t rows, int64_t depth, char* block) {
  if (Transposed) return transpose16((const uint32_t*)a, lda / 2, depth / 2, rows, (uint32_t*)block, 16);
  const __mmask16 mask = (__mmask16)lanes_mask(depth / 2);
  for (int64_t i = 0; i < rows; ++i) _mm512_store_si512(block + i * 64, _mm512_maskz_loadu_epi32(mask, a + i * lda));
}

// Three numbers in the upper halves of their lanes, whose sum is the one that was split: each part but the last is
// rounded to nearest.
constexpr int kAmxParts = 3, kAmxPartProducts = 6;
// Bytes of a panel's 32 values of K.
constexpr int64_t kAmxPanelBlock = kPanel / FK_VL * kAmxParts * kAmxBlock;
struct AmxParts {
  __m512i part[kAmxParts];
};
FK_INLINE AmxParts amx_split(__m512 x) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int)0xffff0000);
  AmxParts p;
#pragma GCC unroll 2
  for (int i = 0; i < kAmxParts - 1; ++i) {
    p.part[i] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(p.part[i]));
  }
  p.part[kAmxParts - 1] = _mm512_castps_si512(x);
  return p;
}
// The parts of two vectors in pairs: a row of each of the blocks of parts.
FK_INLINE void amx_store_parts(__m512 first, __m512 second, char* row) {
  const AmxParts low = amx_split(first), high = amx_split(second);
#pragma GCC unroll 3
  for (int i = 0; i < kAmxParts; ++i)
    _mm512_store_si512(row + i * kAmxBlock,
                       _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low.part[i], 16), high.part[i]));
}

// A block of A in parts. The pairs are of values FK_VL apart: any order of K will do that both operands have.
template <bool Transposed>
FK_INLINE void amx_block(const float* a, int64_t lda, int64_t rows, int64_t depth, char* block) {
  uint32_t turned[2 * kAmxRows * FK_VL] __attribute__((aligned(64)));
  const int64_t rest = max64(depth - FK_VL, 0);
  if (Transposed) {
    transpose16((const uint32_t*)a, lda, min64(depth, FK_VL), rows, turned, FK_VL);
    transpose16((const uint32_t*)a + FK_VL * lda, lda, rest, rows, turned + kAmxRows * FK_VL, FK_VL);
  }
  const __mmask16 first = (__mmask16)lanes_mask(min64(depth, FK_VL)), second = (__mmask16)lanes_mask(rest);
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = Transposed ? (const float*)turned + i * FK_VL : a + i * lda;
    if (Transposed)
      amx_store_parts(_mm512_load_ps(row), _mm512_load_ps(row + kAmxRows * FK_VL), block + i * 64);
    else
      amx_store_parts(_mm512_maskz_loadu_ps(first, row), _mm512_maskz_loadu_ps(second, row + FK_VL), block + i * 64);
  }
}

// One vector of a panel's columns as a block in parts.
FK_INLINE void amx_panel_block(const float* panel, int64_t ldb, int64_t depth, char* block) {
  const auto row = [&](int64_t k) { return k < depth ? _mm512_loadu_ps(panel + k * ldb) : _mm512_setzero_ps(); };
  for (int64_t k = 0; k < FK_VL; ++k) amx_store_parts(row(k), row(k + FK_VL), block + k * 64);
}

// A panel in parts: for each 32 values of K, one vector of columns behind the other.
static __attribute__((noinline)) void amx_panel_blocks(const float* panel, int64_t ldb, int64_t k, char* blocks) {
  for (int64_t i = 0; i < k; i += kAmxDepth)
    for (int64_t j = 0; j < kPanel; j += FK_VL, blocks += kAmxParts * kAmxBlock)
      amx_panel_block(panel + i * ldb + j, ldb, k - i, blocks);
}

// A block of a panel, as A's.
FK_INLINE void amx_panel_block(const bf16* panel, int64_t depth, char* block) {
  for (int64_t i = 0; i < kAmxDepth; ++i)
    _mm512_store_si512(block + i * 64,
                       i < depth ? _mm512_loadu_si512((const char*)panel + i * 64) : _mm512_setzero_si512());
}

// Blocks along K: `count` of them `step` bytes apart with rows of `stride` bytes, then perhaps a last one. Those of the
// next 16 rows or columns lie `other` bytes behind them.
struct AmxOperand {
  const char* blocks;
  int64_t stride, step, count, other;
  const char* last;
  int64_t last_stride, last_other;
};

// Adds the products of a block of each of `Rows` times 16 rows and `NV` vectors of columns to registers 0 to 3.
template <int Rows, int NV>
FK_INLINE void amx_multiply_blocks(const char* rows, int64_t row_stride, int64_t other_rows, const char* columns,
                                   int64_t column_stride, int64_t other_columns) {
  amx_load<4>(rows, row_stride);
  amx_load<6>(columns, column_stride);
  amx_multiply<0, 4, 6>();
  if (NV == 2) amx_load<7>(columns + other_columns, column_stride);
  if (NV == 2) amx_multiply<1, 4, 7>();
  if (Rows == 2) amx_load<5>(rows + other_rows, row_stride);
  if (Rows == 2) amx_multiply<2, 5, 6>();
  if (Rows == 2 && NV == 2) amx_multiply<3, 5, 7>();
}

template <int Rows, int NV>
FK_INLINE void amx_clear_sums() {
  amx_clear<0>();
  if (NV == 2) amx_clear<1>();
  if (Rows == 2) amx_clear<2>();
  if (Rows == 2 && NV == 2) amx_clear<3>();
}
template <int Rows, int NV>
FK_INLINE void amx_store_sums(float* sums, int64_t ldo) {
  amx_store<0>(sums, ldo * 4);
  if (NV == 2) amx_store<1>(sums + FK_VL, ldo * 4);
  if (Rows == 2) amx_store<2>(sums + kAmxRows * ldo, ldo * 4);
  if (Rows == 2 && NV == 2) amx_store<3>(sums + kAmxRows * ldo + FK_VL, ldo * 4);
}

// sums[16 Rows][kPanel], of which the first NV vectors are computed. Two by two blocks are loaded for four products;
// one by two would wait for three loads for two.
template <int Rows, int NV>
static __attribute__((noinline)) void amx_sums(const AmxOperand& a, const AmxOperand& panel, float* sums, int64_t ldo) {
  amx_clear_sums<Rows, NV>();
  const char *rows = a.blocks, *columns = panel.blocks;
  for (int64_t i = 0; i < a.count; ++i, rows += a.step, columns += panel.step)
    amx_multiply_blocks<Rows, NV>(rows, a.stride, a.other, columns, panel.stride, panel.other);
  if (a.last)
    amx_multiply_blocks<Rows, NV>(a.last, a.last_stride, a.last_other, panel.last, panel.last_stride, panel.last_other);
  amx_store_sums<Rows, NV>(sums, ldo);
}

// Adds the products of what registers 4 to 7 hold.
template <int Rows, int NV>
FK_INLINE void amx_multiply_loaded() {
  amx_multiply<0, 4, 6>();
  if (NV == 2) amx_multiply<1, 4, 7>();
  if (Rows == 2) amx_multiply<2, 5, 6>();
  if (Rows == 2 && NV == 2) amx_multiply<3, 5, 7>();
}

// The same from `count` blocks in parts, `other` bytes from those of the next 16 rows. All six products go to one sum:
// an instruction adds its 32 terms among themselves first, so that 32 values of K round the sum six times, where
// multiply-adds round it 32 times.
template <int Rows, int NV>
static __attribute__((noinline)) void amx_sums_of_parts(const char* rows, int64_t other, const char* columns,
                                                        int64_t count, float* sums, int64_t ldo) {
  const auto load_rows = [&](int part) __attribute__((always_inline)) {
    amx_load<4>(rows + part * kAmxBlock, 64);
    if (Rows == 2) amx_load<5>(rows + other + part * kAmxBlock, 64);
  };
  const auto load_columns = [&](int part) __attribute__((always_inline)) {
    amx_load<6>(columns + part * kAmxBlock, 64);
    if (NV == 2) amx_load<7>(columns + (kAmxParts + part) * kAmxBlock, 64);
  };
  amx_clear_sums<Rows, NV>();
  for (int64_t i = 0; i < count; ++i, rows += kAmxParts * kAmxBlock, columns += 2 * kAmxParts * kAmxBlock) {
    load_columns(0);
    load_rows(2);
    amx_multiply_loaded<Rows, NV>();
    load_rows(0);
    amx_multiply_loaded<Rows, NV>();
    load_rows(1);
    amx_multiply_loaded<Rows, NV>();
    load_columns(1);
    amx_multiply_loaded<Rows, NV>();
    load_rows(0);
    amx_multiply_loaded<Rows, NV>();
    load_columns(2);
    amx_multiply_loaded<Rows, NV>();
  }
  amx_store_sums<Rows, NV>(sums, ldo);
}

// The rows, as bits, with a sum that parts may not have given: it is no number or infinite, or so small that parts of
// its terms may have been taken for zeros.
FK_INLINE uint32_t doubtful_rows(const float* sums, int64_t stride, int64_t rows, int64_t width) {
  // Twice a number's bits are those of its size. Less one, a zero is above all; the least is 2^-96.
  const __m512i one = _mm512_set1_epi32(1), least = _mm512_set1_epi32((31 << 24) - 1);
  const __m512i infinite = _mm512_set1_epi32((int)(255u << 24));
  struct Range {
    __m512i low, high;
  };
  const Range none = {_mm512_set1_epi32(-1), _mm512_setzero_si512()};
  const auto see = [&](int64_t row, Range& r) {
    for (int64_t j = 0; j < min64(width, kPanel); j += FK_VL) {
      const __m512i bits = _mm512_loadu_si512(sums + row * stride + j), twice = _mm512_add_epi32(bits, bits);
      r.low = _mm512_min_epu32(r.low, _mm512_sub_epi32(twice, one));
      r.high = _mm512_max_epu32(r.high, twice);
    }
  };
  const auto doubts = [&](const Range& r) {
    return (_mm512_cmplt_epu32_mask(r.low, least) | _mm512_cmpge_epu32_mask(r.high, infinite)) != 0;
  };
  Range all = none;
  for (int64_t i = 0; i < rows; ++i) see(i, all);
  if (!doubts(all)) return 0;
  uint32_t doubtful = 0;
  for (int64_t i = 0; i < rows; ++i) {
    Range own = none;
    see(i, own);
    doubtful |= (uint32_t)doubts(own) << i;
  }
  return doubtful;
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

// Calls `compute` with how many blocks of rows and vectors of columns of a tile are wanted.
template <int Rows, int NV>
struct AmxShape {
  static constexpr int rows = Rows, vectors = NV;
};
template <class Compute>
FK_INLINE void with_amx_shape(int64_t rows, int64_t width, Compute compute) {
  const bool pair = rows > kAmxRows;
  if (width <= kPanel - FK_VL)
    pair ? compute(AmxShape<2, FK_NV - 1>()) : compute(AmxShape<1, FK_NV - 1>());
  else
    pair ? compute(AmxShape<2, FK_NV>()) : compute(AmxShape<1, FK_NV>());
}

// Bytes of blocks of A that stay in L2.
constexpr int64_t kAmxGroup = 768 << 10;

// Bytes of a block of A with all its parts.
template <class A>
constexpr int64_t kAmxRowBlock = (sizeof(A) == 4 ? kAmxParts : 1) * kAmxBlock;

// The blocks of rows [first, last), row after row. Of 16 rows the first `left_out` blocks keep their place, unmade.
template <bool Transposed, class A>
static __attribute__((noinline)) void amx_blocks(const A* a, int64_t lda, int64_t first, int64_t last, int64_t rows,
                                                 int64_t k, char* blocks, int64_t left_out = 0) {
  const int64_t count = ceil_div(k, kAmxDepth);
  for (int64_t row = first; row < last; row += kAmxRows, blocks += count * kAmxRowBlock<A>) {
    const int64_t height = min64(kAmxRows, rows - row);
    for (int64_t i = height == kAmxRows ? left_out : 0; i < count; ++i) {
      const int64_t at = i * kAmxDepth;
      amx_block<Transposed>(a + (Transposed ? at / kStep<A> * lda + row * kStep<A> : row * lda + at), lda, height,
                            min64(kAmxDepth, k - at), blocks + i * kAmxRowBlock<A>);
    }
  }
}

// Asks for the share of tiles [first, last) of `tiles` in what will be read next.
FK_INLINE void amx_fetch(const void* next, int64_t bytes, int64_t first, int64_t last, int64_t tiles) {
  const int64_t share = round_up(ceil_div(bytes, tiles), 64);
  for (int64_t i = first * share; i < min64(last * share, bytes); i += 64)
    __builtin_prefetch((const char*)next + i, 0, 2);
}

// each_tile on tile registers. Rows of A that meet few panels are read where they lie, except for what is no whole
// block.
template <bool Transposed, class Body>
FK_INLINE void amx_each_tile(const bf16* a, int64_t lda, int64_t rows, const Panels<bf16>& w, const char* made,
                             Body body) {
  constexpr int64_t kFewPanels = 3, panel_block = 2 * kAmxBlock;
  const bool direct = !made && !Transposed && w.count <= kFewPanels;
  const int64_t blocks = ceil_div(w.k, kAmxDepth), whole = w.k / kAmxDepth, tiles = ceil_div(rows, kAmxRows);
  const int64_t other = blocks * kAmxBlock;
  // A panel stays in L1 beside the rows that it meets: of a deep one, beside half as many.
  const bool pairs = blocks * 4 * kAmxBlock <= 40 << 10;
  const int64_t group = direct || made ? tiles : min64(tiles, max64(2, kAmxGroup / other / 2 * 2));
  char* const rest = (char*)fk_block_memory(panel_block + (made ? 0 : group * other));
  char* const a_blocks = rest + panel_block;
  const int64_t fetched = w.after ? w.k * kPanel * (int64_t)sizeof(bf16) : 0;
  for (int64_t begin = 0; begin < tiles; begin += group) {
    const int64_t end = min64(begin + group, tiles);
    if (!made)
      amx_blocks<Transposed>(a, lda, begin * kAmxRows, end * kAmxRows, rows, w.k, a_blocks, direct ? whole : 0);
    for (int64_t n = 0; n < w.count; ++n) {
      const bf16* panel = w.first + n * w.step;
      const bf16* next = n + 1 < w.count ? panel + w.step : w.after;
      if (whole < blocks) amx_panel_block(panel + whole * kAmxDepth * kPanel, w.k - whole * kAmxDepth, rest);
      const AmxOperand right = {(const char*)panel, kPanel * 4, panel_block, whole,
                                FK_VL * 4,          rest,       kPanel * 4,  FK_VL * 4};
      int64_t height;
      for (int64_t row = begin * kAmxRows; row < min64(end * kAmxRows, rows); row += height) {
        const int64_t left_over = min64(end * kAmxRows, rows) - row, t = row / kAmxRows - begin;
        // Rows that are read where they lie are whole blocks.
        height = min64(left_over, pairs && (!direct || left_over >= kTileRows) ? kTileRows : kAmxRows);
        const char* own = (made ? made : a_blocks) + t * other;
        const char* last = whole < blocks ? own + whole * kAmxBlock : nullptr;
        AmxOperand left = {own, 64, kAmxBlock, whole, other, last, 64, other};
        if (direct && height % kAmxRows == 0) {
          left.blocks = (const char*)(a + row * lda);
          left.stride = lda * 2;
          left.step = kAmxDepth * 2;
          left.other = kAmxRows * lda * 2;
        }
        amx_fetch(next, fetched, t, t + ceil_div(height, kAmxRows), end - begin);
        body(n, row, height, [&](float* out, int64_t ldo, bool accumulate, int64_t width) {
          float sums[kTileRows * kPanel] __attribute__((aligned(64)));
          const bool at_once = height % kAmxRows == 0 && !accumulate;
          with_amx_shape(height, width, [&](auto shape) {
            amx_sums<shape.rows, shape.vectors>(left, right, at_once ? out : sums, at_once ? ldo : kPanel);
          });
          if (!at_once) place_tile(sums, height, width, out, ldo, accumulate);
        });
      }
    }
  }
}

// The same in parts.
template <bool Transposed, class Body>
FK_INLINE void amx_each_tile(const float* a, int64_t lda, int64_t rows, const Panels<float>& w, const char* made,
                             Body body) {
  constexpr int64_t a_block = kAmxRowBlock<float>;
  const int64_t blocks = ceil_div(w.k, kAmxDepth), tiles = ceil_div(rows, kAmxRows), other = blocks * a_block;
  const int64_t group = made ? tiles : min64(tiles, max64(2, kAmxGroup / other / 2 * 2));
  char* const own_columns = (char*)fk_block_memory(blocks * kAmxPanelBlock + (made ? 0 : group * other));
  char* const a_blocks = own_columns + blocks * kAmxPanelBlock;
  for (int64_t begin = 0; begin < tiles; begin += group) {
    const int64_t end = min64(begin + group, tiles);
    if (!made) amx_blocks<Transposed>(a, lda, begin * kAmxRows, end * kAmxRows, rows, w.k, a_blocks);
    for (int64_t n = 0; n < w.count; ++n) {
      const float* panel = w.first + n * w.step;
      const char* columns = w.parts ? w.parts + n * w.parts_step : own_columns;
      if (!w.parts) amx_panel_blocks(panel, w.row, w.k, own_columns);
      for (int64_t t = begin; t < end; t += kTileRows / kAmxRows) {
        const int64_t row = t * kAmxRows, height = min64(kTileRows, min64(end * kAmxRows, rows) - row);
        const char* own = (made ? made : a_blocks) + (t - begin) * other;
        body(n, row, height, [&](float* out, int64_t ldo, bool accumulate, int64_t width) {
          float buffer[kTileRows * kPanel] __attribute__((aligned(64)));
          const bool at_once = height % kAmxRows == 0 && !accumulate;
          float* sums = at_once ? out : buffer;
          const int64_t stride = at_once ? ldo : kPanel;
          with_amx_shape(height, width, [&](auto shape) {
            amx_sums_of_parts<shape.rows, shape.vectors>(own, other, columns, blocks, sums, stride);
          });
          const Ahead nothing = {(const char*)panel, 0};
          if (const uint32_t doubtful = doubtful_rows(sums, stride, height, width))
            for (int64_t i = 0; i < height; ++i)
              if (doubtful >> i & 1)
                tile<Transposed>(1, a + (row + i) * (Transposed ? 1 : lda), lda, panel, w.row, w.k, sums + i * stride,
                                 stride, false, nothing, width);
          if (!at_once) place_tile(sums, height, width, out, ldo, accumulate);
        });
      }
    }
  }
}

// Whether products of fp32 are made in parts: where that takes fewer cycles, of products of blocks, of placing their
// sums and of making blocks, than the vectors' multiply-adds, if a task has a hundred rows. How many it has depends on
// the number of threads, and results must not; nor on whether panels are in parts already. A close call is the
// vectors', whose operands take less of the cache, and so are short sums.
FK_INLINE bool amx_pays(int64_t panels, int64_t k) {
  constexpr int64_t rows = 96, tiles = rows / kAmxRows;
  const int64_t blocks = ceil_div(k, kAmxDepth);
  const int64_t products = tiles * panels * (180 * blocks + 85), making = (tiles * 215 + panels * 360) * blocks;
  return k > kAmxDepth && 11 * (products + making) < 10 * rows * panels * k;
}

}  // namespace
