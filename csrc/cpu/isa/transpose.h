// Matrices of 32-bit words with their rows and columns exchanged.
#pragma once

#include "vec.h"

namespace {

typedef uint32_t v4 __attribute__((vector_size(16), aligned(4), may_alias));

// to[c * to_stride + r] = from[r * from_stride + c] for 4 x 4 words of 32 bits.
FK_INLINE void transpose4(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  v4 a = *(const v4*)from, b = *(const v4*)(from + from_stride);
  v4 c = *(const v4*)(from + 2 * from_stride), d = *(const v4*)(from + 3 * from_stride);
  v4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  v4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *(v4*)to = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5);
  *(v4*)(to + to_stride) = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
  *(v4*)(to + 2 * to_stride) = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5);
  *(v4*)(to + 3 * to_stride) = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
}

#ifdef __AVX512F__
// to[c * to_stride + r] = from[r * stride + c] for 16 x 16 words, of which the first `rows` rows and `columns` columns
// are read; the other rows are taken for zeros.
FK_INLINE void transpose16(const uint32_t* from, int64_t stride, int64_t rows, int64_t columns, uint32_t* to,
                           int64_t to_stride) {
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
    _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (8 + j) * to_stride, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + (4 + j) * to_stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (12 + j) * to_stride, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}
#endif

// to[c * to_stride + r] = from[r * from_stride + c] for a rows x columns matrix; rows in [rows, padded_rows) of `to`
// become zero.
FK_INLINE void transpose(const uint32_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint32_t* to,
                         int64_t to_stride, int64_t padded_rows) {
  int64_t done = 0;
#ifdef __AVX512F__
  if (padded_rows % 16 == 0)
    for (; done + 16 <= columns; done += 16)
      for (int64_t r = 0; r < padded_rows; r += 16)
        transpose16(from + r * from_stride + done, from_stride, rows - r, 16, to + done * to_stride + r, to_stride);
#endif
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = done;
    for (; c + 4 <= columns; c += 4)
      transpose4(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    for (; c < columns; ++c)
      for (int64_t i = r; i < r + 4; ++i) to[c * to_stride + i] = from[i * from_stride + c];
  }
  for (; r < rows; ++r)
    for (int64_t c = done; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  for (; r < padded_rows; ++r)
    for (int64_t c = done; c < columns; ++c) to[c * to_stride + r] = 0;
}

}  // namespace
