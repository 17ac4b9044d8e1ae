// Rows of a tensor, normalised in fp32, as tiles of the compute dtype: 16 bytes at a time where rows begin at multiples
// of that. As many lanes have a row as 64 values have vectors, and a lane has vectors of four rows under way.
#pragma once

#include "tiles.h"

namespace fk {

constexpr int kRowStep = 64;
constexpr int kRowsOfLane = 4;
template <class T>
constexpr int kLanesOfRow = kRowStep / kVector<T>;
// Rows that a warp has at a time.
template <class T>
constexpr int kRowsOfWarp = kWarp / kLanesOfRow<T> * kRowsOfLane;

template <class T>
struct RowVectors {
  float x[kRowsOfLane][kVector<T>];
};

// Of rows that begin at `first`, zeros where that is negative, the values from `column` on. With `vectors` rows begin
// at multiples of 16 bytes and hold whole vectors.
template <class T>
__device__ void load_rows(RowVectors<T>& to, const Array& x, const int64_t (&first)[kRowsOfLane], int column,
                          int columns, bool vectors) {
  const int count = columns - column;
  with_values<T>(x, [&](const auto* values) {
    // All of them are under way before the first one is needed.
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        if (first[i] >= 0 && count > 0)
          load_vector<T>(to.x[i], values + first[i] + column);
        else
          for (int j = 0; j < kVector<T>; ++j) to.x[i][j] = 0.0f;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i)
        for (int j = 0; j < kVector<T>; ++j)
          to.x[i][j] = first[i] >= 0 && j < count ? to_float(values[first[i] + column + j]) : 0.0f;
    }
  });
}

// Mean and factor of each row's LayerNorm, by whole warps. `values` has the rows' first vectors, and has them still
// where a row is no longer.
template <class T>
__device__ void row_spreads(float2 (&to)[kRowsOfLane], RowVectors<T>& values, const Array& x,
                            const int64_t (&first)[kRowsOfLane], int columns, bool vectors, float eps) {
  const int own = lane_index() % kLanesOfRow<T> * kVector<T>;
  const auto for_each = [&](const auto& use) {
#pragma unroll 1
    for (int c = 0; c < columns; c += kRowStep) {
      if (columns > kRowStep) load_rows(values, x, first, own + c, columns, vectors);
      for (int i = 0; i < kRowsOfLane; ++i)
        for (int j = 0; j < kVector<T>; ++j) use(i, own + c + j < columns, values.x[i][j]);
    }
  };
  float sums[kRowsOfLane] = {};
  for_each([&](int i, bool, float value) { sums[i] += value; });
  for (int i = 0; i < kRowsOfLane; ++i) {
    to[i].x = warp_sum<kLanesOfRow<T>>(sums[i]) / columns;
    sums[i] = 0.0f;
  }
  for_each([&](int i, bool here, float value) {
    const float deviation = here ? value - to[i].x : 0.0f;
    sums[i] += deviation * deviation;
  });
  for (int i = 0; i < kRowsOfLane; ++i) to[i].y = rsqrtf(warp_sum<kLanesOfRow<T>>(sums[i]) / columns + eps);
}

// The norm's weight and bias of the channels from `column` on.
template <class T>
struct RowAffine {
  float weight[kVector<T>], bias[kVector<T>];

  __device__ RowAffine(const Norm& norm, int column, int columns) {
    const bool whole = columns - column >= kVector<T>;
    for (int i = 0; i < kVector<T>; ++i) weight[i] = 1.0f;
    for (int i = 0; i < kVector<T>; ++i) bias[i] = 0.0f;
    if (norm.weight.data) load_values<T>(weight, norm.weight, column, columns - column, whole && norm.weight.aligned);
    if (norm.bias.data) load_values<T>(bias, norm.bias, column, columns - column, whole && norm.bias.aligned);
  }
};

// A row's values from `column` on into a tile, zeros where there is no row and from `columns` on.
template <class T>
__device__ void store_normalized(T* to, const float (&values)[kVector<T>], float2 spread, const RowAffine<T>& affine,
                                 bool here, int column, int columns) {
  float results[kVector<T>];
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) {
    const float value = (values[j] - spread.x) * spread.y;
    results[j] = here && column + j < columns ? value * affine.weight[j] + affine.bias[j] : 0.0f;
  }
  store_vector(to, results);
}

// Fills `rows` rows of a tile: `index(row)` is the row of x of this tile's row, negative for a row of zeros. `sample`
// chooses the statistics of a GroupNorm. A warp has the `kRowsOfWarp` rows from `begin` on and those `step` further
// down; with `vectors` rows of x begin at multiples of 16 bytes and hold whole vectors.
template <class T, class Index>
__device__ void fill_normalized_rows(T* tile, int stride, int rows, int begin, int step, const Array& x, int columns,
                                     const Norm& norm, int sample, bool vectors, const Index& index) {
  constexpr int kAtOnce = kWarp / kLanesOfRow<T>;
  const int padded = round_up(columns, Fragments<T>::kDepth), own = lane_index() % kLanesOfRow<T> * kVector<T>;
  float2 whole = make_float2(0.0f, 1.0f);
  if (norm.kind == kGroupNorm)
    whole = make_float2(norm.statistics[2 * sample], rsqrtf(norm.statistics[2 * sample + 1] + norm.eps));
#pragma unroll 1
  for (; begin < rows; begin += step) {
    int64_t first[kRowsOfLane];
    float2 spreads[kRowsOfLane];
    RowVectors<T> values;
    for (int i = 0; i < kRowsOfLane; ++i) {
      const int r = begin + lane_index() / kLanesOfRow<T> + i * kAtOnce;
      const int64_t row = r < rows ? index(r) : int64_t{-1};
      first[i] = row < 0 ? row : row * columns;
      spreads[i] = whole;
    }
    load_rows(values, x, first, own, columns, vectors);
    if (norm.kind == kLayerNorm) row_spreads(spreads, values, x, first, columns, vectors, norm.eps);
#pragma unroll 1
    for (int c = 0; c < padded; c += kRowStep) {
      if (columns > kRowStep) load_rows(values, x, first, own + c, columns, vectors);
      const RowAffine<T> affine(norm, own + c, columns);
      for (int i = 0; i < kRowsOfLane; ++i) {
        const int r = begin + lane_index() / kLanesOfRow<T> + i * kAtOnce;
        if (r < rows && own + c < padded)
          store_normalized(tile + r * stride + own + c, values.x[i], spreads[i], affine, first[i] >= 0, own + c,
                           columns);
      }
    }
  }
}

}  // namespace fk
