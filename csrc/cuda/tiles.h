// Tiles in shared memory: filled from rows in global memory, multiplied by the weight of a linear layer.
#pragma once

#include "fragments.h"

namespace fk {

// Values between the rows of a tile of this many columns: whole fragments, and 16 bytes against bank conflicts.
template <class T>
__host__ __device__ constexpr int tile_stride(int columns) {
  return round_up(columns, Fragments<T>::kDepth) + 16 / static_cast<int>(sizeof(T));
}

// Fills rows of a tile with `columns` values from `from + offset(i)`, zeros where that is negative, and zeros up to
// `padded` columns. With `vectors` rows begin at multiples of 16 bytes and hold a multiple of them. All threads take
// part; copies may be under way until `wait_for_copies`.
template <class T, class Offset>
__device__ void fill_tile(T* tile, int stride, int rows, int columns, int padded, bool vectors, const T* from,
                          const Offset& offset) {
  constexpr int kVector = 16 / sizeof(T);
  const int width = vectors ? kVector : 1;
  const int pieces = padded / width;
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int r = i / pieces, c = i % pieces * width;
    const int64_t begin = offset(r);
    const bool valid = begin >= 0 && c < columns;
    T* to = tile + r * stride + c;
    if (vectors)
      copy_16(to, valid ? from + begin + c : from, valid);
    else
      *to = valid ? from[begin + c] : from_float<T>(0.0f);
  }
}

// Columns of results that are made at a time, and the accumulators that hold a warp's rows of them.
constexpr int kPanel = 64;
constexpr int kPanelTiles = kPanel / 8;

template <int kTiles>
__device__ void clear(float (&accumulators)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) accumulators[n][i] = 0.0f;
}

// Calls `use(row, column, values)` for the lane's pairs of neighbouring values; `row` is the accumulators' first one.
template <int kTiles, class Use>
__device__ void for_each_pair(float (&accumulators)[kTiles][4], int row, const Use& use) {
  const int lane = lane_index();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    use(row + lane / 4, n * 8 + lane % 4 * 2, &accumulators[n][0]);
    use(row + lane / 4 + 8, n * 8 + lane % 4 * 2, &accumulators[n][2]);
  }
}

// Adds to each column its value of `bias`, whose first `count` values are there.
template <class T, int kTiles>
__device__ void add_bias(float (&accumulators)[kTiles][4], const Array& bias, int first, int count) {
  with_values<T>(bias, [&](const auto* values) {
    const int own = lane_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float added = to_float(values[first + min(n * 8 + own + i, count - 1)]);
        accumulators[n][i] += added;
        accumulators[n][i + 2] += added;
      }
  });
}

// Writes columns below `columns` of accumulators into this warp's rows of a tile, of which those from `count` on become
// zeros.
template <class T, int kTiles>
__device__ void put_tile(float (&accumulators)[kTiles][4], T* tile, int stride, int count, int columns) {
  for_each_pair(accumulators, 0, [&](int r, int c, const float* values) {
    if (c >= columns) return;
    store_pair(tile + r * stride + c, c < count ? values[0] : 0.0f, c + 1 < count ? values[1] : 0.0f);
  });
}

// Adds the residual to 16 of a warp's rows of a tile and writes them out: `columns` values of the row that begins at
// `offset(row)` in both, nothing where that is negative. A row takes `kLanes` lanes, each of them one vector of values,
// and is no longer than that allows. With `vectors` the result's rows begin at multiples of 16 bytes, and the
// residual's. `note` sees every result.
template <int kLanes, class T, class Offset, class Note>
__device__ void write_rows(const T* tile, int stride, int columns, void* out, DType dtype, const Array& residual,
                           bool vectors, const Offset& offset, const Note& note) {
  constexpr int kAtOnce = kWarp / kLanes;
  const int own = lane_index() / kLanes, c = lane_index() % kLanes * kVector<T>;
  const int count = min(columns - c, kVector<T>);
#pragma unroll 1
  for (int r = own; r < 16; r += kAtOnce) {
    const int64_t first = offset(r);
    if (first < 0 || count <= 0) continue;
    float values[kVector<T>], added[kVector<T>];
    load_vector<T>(values, tile + r * stride + c);
    if (residual.data) {
      load_values<T>(added, residual, first + c, count, vectors);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) values[i] += added[i];
    }
    store_values<T>(out, dtype, first + c, values, count, vectors);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      if (i < count) note(values[i]);
  }
}

}  // namespace fk
