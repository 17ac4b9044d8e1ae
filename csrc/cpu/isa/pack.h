// A linear layer's weights in the order the microkernel reads them.
#pragma once

#include "rows.h"

namespace {

// With taps, the columns of a weight are stored as [channel, tap] and run over [tap, channel] here.
FK_INLINE int64_t source_column(const struct fk_pack_linear& p, int64_t columns, int64_t column) {
  const int64_t channels = columns / p.taps;
  return p.taps == 1 ? column : (column % channels) * p.taps + column / channels;
}

template <class T>
FK_INLINE float weight_at(const struct fk_pack_linear& p, int64_t n, int64_t k) {
  const T* weight = (const T*)p.weight.data;
  return to_float(p.transposed ? weight[(k * p.n + n) * p.step] : weight[n * p.k + source_column(p, p.k, k)]);
}

// A panel of a weight with taps: its columns are transposed a few at a time, as they are stored, and go to their rows.
FK_INLINE void pack_taps(const struct fk_pack_linear& p, const float* weight, int64_t rows, float* to) {
  constexpr int64_t kColumns = 4;
  const int64_t channels = p.k / p.taps;
  float columns[kColumns * kPanel] __attribute__((aligned(64)));
  int64_t channel = 0, tap = 0;
  for (int64_t k = 0; k < p.k; k += kColumns) {
    const int64_t count = min64(kColumns, p.k - k);
    transpose((const uint32_t*)weight + k, p.k, rows, count, (uint32_t*)columns, kPanel, kPanel);
    for (int64_t i = 0; i < count; ++i) {
      copy_row(columns + i * kPanel, kPanel, kPanel, to + (tap * channels + channel) * kPanel);
      if (++tap < p.taps) continue;
      tap = 0;
      ++channel;
    }
  }
}

// Every `step`th of the values from here on.
template <class T>
FK_INLINE vf load_every(const T* from, int64_t step) {
  if (step == 1) return load(from);
  float lanes[FK_VL] __attribute__((aligned(64)));
  for (int64_t i = 0; i < FK_VL; ++i) lanes[i] = to_float(from[i * step]);
  return load(lanes);
}
#ifdef __AVX512F__
FK_INLINE vf load_every(const float* from, int64_t step) {
  if (step == 1) return load(from);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return (vf)_mm512_i32gather_ps(_mm512_mullo_epi32(lanes, _mm512_set1_epi32((int32_t)step)), from, 4);
}
#endif

// Columns of a panel that are packed at a time. As many rows of the weight are read as a panel has, or a few values of
// each of its rows: more than the hardware follows, so that what comes next is asked for beforehand.
constexpr int64_t kPackedColumns = 32, kFetchedRows = 16;
FK_INLINE void fetch_columns(const float* weight, int64_t row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < columns; k += 16) __builtin_prefetch(weight + i * row + k);
}

#if FK_NATIVE_BF16
constexpr int64_t kPackedTaps = 64;
// A panel of a weight with taps in pairs of channels, of which there is an even number.
FK_INLINE void pack_tap_pairs(const struct fk_pack_linear& p, const float* weight, int64_t rows, bf16* to) {
  const int64_t channels = p.k / p.taps;
  float columns[2 * kPackedTaps * kPanel] __attribute__((aligned(64)));
  for (int64_t c = 0; c < channels; c += 2) {
    transpose((const uint32_t*)weight + c * p.taps, p.k, rows, 2 * p.taps, (uint32_t*)columns, kPanel, kPanel);
    for (int64_t tap = 0; tap < p.taps; ++tap)
      for (int64_t j = 0; j < kPanel; j += FK_VL)
        *(vu*)(to + (tap * channels + c) * kPanel + 2 * j) =
            pair_bf16(load(columns + tap * kPanel + j), load(columns + (p.taps + tap) * kPanel + j));
  }
}

// A panel in pairs of columns, a few columns at a time.
FK_INLINE void pack_pairs(const struct fk_pack_linear& p, const float* weight, int64_t rows, bf16* to) {
  float columns[kPackedColumns * kPanel] __attribute__((aligned(64)));
  for (int64_t k = 0; k < p.k; k += kPackedColumns) {
    const int64_t count = min64(kPackedColumns, p.k - k);
    fetch_columns(weight + k + count, p.k, rows, min64(kPackedColumns, p.k - k - count));
    transpose((const uint32_t*)weight + k, p.k, rows, count, (uint32_t*)columns, kPanel, kPanel);
    for (int64_t i = 0; i < count; i += 2)
      for (int64_t j = 0; j < kPanel; j += FK_VL) {
        const vf high = i + 1 < count ? load(columns + (i + 1) * kPanel + j) : splat(0.0f);
        *(vu*)(to + (k + i) * kPanel + 2 * j) = pair_bf16(load(columns + i * kPanel + j), high);
      }
  }
}
#endif

// Columns [begin, end) of an fp32 panel of a weight as it lies, or of a whole panel of a transposed one.
template <class T>
FK_INLINE void pack_columns(const struct fk_pack_linear& p, int64_t first, int64_t begin, int64_t end, float* to) {
  if (!p.transposed) {
    const float* weight = (const float*)p.weight.data + first * p.k;
    const int64_t rows = min64(kPanel, p.n - first);
    fetch_columns(weight + end, p.k, rows, min64(kPackedColumns, p.k - end));
    transpose((const uint32_t*)weight + begin, p.k, rows, end - begin, (uint32_t*)to + begin * kPanel, kPanel, kPanel);
    return;
  }
  for (int64_t k = begin; k < end; ++k)
    for (int64_t j = 0; j < kPanel; j += FK_VL) {
      const T* from = (const T*)p.weight.data + (k * p.n + first + j) * p.step;
      __builtin_prefetch(from + kFetchedRows * p.n * p.step);
      store(to + k * kPanel + j, load_every(from, p.step));
    }
}

// Of a panel in fp32 the parts, where there is room for them.
FK_INLINE void pack_parts(const struct fk_pack_linear& p, int64_t panel, int64_t begin, int64_t end) {
#if FK_AMX
  static_assert(kPackedColumns % kAmxDepth == 0, "");
  if (p.parts)
    amx_panel_blocks((const float*)p.panels + (panel * p.k + begin) * kPanel, kPanel, end - begin,
                     (char*)p.parts + panel * part_bytes(p.k) + part_bytes(begin));
#else
  (void)p, (void)panel, (void)begin, (void)end;
#endif
}

template <class T>
FK_INLINE void pack_rows(const struct fk_pack_linear& p, int64_t panel) {
  int64_t first = panel * kPanel, rows = min64(kPanel, p.n - first);
#if FK_NATIVE_BF16
  if (p.low_precision) {
    int64_t depth = round_up(p.k, 2);
    bf16* to = (bf16*)p.panels + panel * kPanel * depth;
    if (p.transposed && rows == kPanel) {
      for (int64_t k = 0; k < depth; k += 2)
        for (int64_t j = 0; j < kPanel; j += FK_VL) {
          const T* from = (const T*)p.weight.data + (k * p.n + first + j) * p.step;
          for (int64_t i = 0; i < 2; ++i) __builtin_prefetch(from + (kFetchedRows + i) * p.n * p.step);
          const vf next = k + 1 < p.k ? load_every(from + p.n * p.step, p.step) : splat(0.0f);
          *(vu*)(to + k * kPanel + 2 * j) = pair_bf16(load_every(from, p.step), next);
        }
      return;
    }
    if (sizeof(T) == 4 && p.taps > 1 && p.taps <= kPackedTaps && !p.transposed && p.k / p.taps % 2 == 0)
      return pack_tap_pairs(p, (const float*)p.weight.data + first * p.k, rows, to);
    if (sizeof(T) == 4 && p.taps == 1 && !p.transposed)
      return pack_pairs(p, (const float*)p.weight.data + first * p.k, rows, to);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < kPanel; ++j)
        from_float(to + (k / 2) * kPanel * 2 + 2 * j + k % 2,
                   j < rows && k < p.k ? weight_at<T>(p, first + j, k) : 0.0f);
    return;
  }
#endif
  float* to = (float*)p.panels + panel * kPanel * p.k;
  if (p.transposed ? rows == kPanel : sizeof(T) == 4 && p.taps == 1) {
    for (int64_t k = 0; k < p.k; k += kPackedColumns) {
      const int64_t end = min64(p.k, k + kPackedColumns);
      pack_columns<T>(p, first, k, end, to);
      pack_parts(p, panel, k, end);
    }
    return;
  }
  if (sizeof(T) == 4 && !p.transposed)
    pack_taps(p, (const float*)p.weight.data + first * p.k, rows, to);
  else
    for (int64_t k = 0; k < p.k; ++k)
      for (int64_t j = 0; j < kPanel; ++j) to[k * kPanel + j] = j < rows ? weight_at<T>(p, first + j, k) : 0.0f;
  pack_parts(p, panel, 0, p.k);
}

// Bytes of the parts of a weight of so many panels, none where products with it are not made of those.
int64_t weight_part_bytes(int64_t panels, int64_t k) {
#if FK_AMX
  if (!amx_pays(panels, k)) return 0;
#endif
  return panels * part_bytes(k);
}

void pack_panel(const struct fk_pack_linear* p, int64_t panel) {
  if (p->weight.dtype == FK_F32)
    pack_rows<float>(*p, panel);
  else
    pack_rows<bf16>(*p, panel);
  for (int64_t j = 0; j < kPanel; ++j) {
    int64_t i = panel * kPanel + j;
    bool present = p->bias.data && i < p->n;
    p->packed_bias[i] = !present                  ? 0.0f
                        : p->bias.dtype == FK_F32 ? ((const float*)p->bias.data)[i]
                                                  : to_float(((const bf16*)p->bias.data)[i]);
  }
}

}  // namespace
