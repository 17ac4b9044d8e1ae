// Rows of a tensor, normalised in fp32, as a tile of the compute dtype.
#pragma once

#include "tiles.h"

namespace fk {

// Fills this warp's 16 rows of a tile: `index(row)` is the row of x of this tile's row, negative for a row of zeros.
// `sample` chooses the statistics of a GroupNorm.
template <class T, class Index>
__device__ void fill_normalized_rows(T* tile, int stride, const Array& x, int columns, const Norm& norm, int sample,
                                     const Index& index) {
  const int lane = lane_index();
  const int padded = round_up(columns, Fragments<T>::kDepth);
#pragma unroll 1
  for (int r = 16 * warp_index(); r < 16 * warp_index() + 16; ++r) {
    T* to = tile + r * stride;
    const int64_t row = index(r);
    if (row < 0) {
      for (int c = lane; c < padded; c += kWarp) to[c] = from_float<T>(0.0f);
      continue;
    }
    const int64_t first = row * columns;
    float mean = 0.0f, factor = 1.0f;
    if (norm.kind == kLayerNorm) {
      float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
      for (int c = lane; c < columns; c += kWarp) sum += load<T>(x, first + c);
      mean = warp_sum(sum) / columns;
#pragma unroll 1
      for (int c = lane; c < columns; c += kWarp) {
        const float deviation = load<T>(x, first + c) - mean;
        squares += deviation * deviation;
      }
      factor = rsqrtf(warp_sum(squares) / columns + norm.eps);
    } else if (norm.kind == kGroupNorm) {
      mean = norm.statistics[2 * sample];
      factor = rsqrtf(norm.statistics[2 * sample + 1] + norm.eps);
    }
#pragma unroll 1
    for (int c = lane; c < padded; c += kWarp) {
      float value = 0.0f;
      if (c < columns) {
        value = (load<T>(x, first + c) - mean) * factor;
        value = value * load_or<T>(norm.weight, c, 1.0f) + load_or<T>(norm.bias, c, 0.0f);
      }
      to[c] = from_float<T>(value);
    }
  }
}

}  // namespace fk
