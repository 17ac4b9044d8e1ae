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

// Columns of results that a warp makes at a time, and the accumulators that hold them.
constexpr int kPanel = 64;
constexpr int kPanelTiles = kPanel / 8;

// Bytes of a weight's row that are in shared memory at a time.
constexpr int kStageBytes = 128;
constexpr int kStageRowBytes = kStageBytes + 16;
constexpr int kStages = 2;
constexpr int64_t kStagingBytes = int64_t{kStages} * kPanel * kStageRowBytes;

// to += tile * weight^T for this warp's 16 rows of a tile [rows, depth] and 64 rows of a weight [n, depth], of which
// `rows` are there. Warps that share rows of the tile take one of `kGroups` panels of 64 each; a warp without rows has
// null for the tile.
// All warps of the block meet here; `staging` is theirs. The tile must be complete and its padding zero.
template <int kGroups, class T>
__device__ void multiply_by_weight(float (&to)[kPanelTiles][4], const T* tile, int stride, const T* weight, int depth,
                                   int64_t weight_stride, int rows, bool vectors, T* staging, int group = 0) {
  using F = Fragments<T>;
  constexpr int kStep = kStageBytes / sizeof(T);
  constexpr int kStride = kStageRowBytes / sizeof(T);
  constexpr int kRows = kGroups * kPanel;
  const int steps = (depth + kStep - 1) / kStep;
  const auto stage = [&](int step) {
    const int begin = step * kStep;
    fill_tile(staging + step % kStages * kRows * kStride, kStride, kRows, min(kStep, depth - begin), kStep, vectors,
              weight + begin, [&](int r) { return r < rows ? r * weight_stride : int64_t{-1}; });
  };
  // One part is on its way while the one before it is multiplied.
#pragma unroll 1
  for (int staged = 0; staged <= steps; ++staged) {
    if (staged < steps) stage(staged);
    end_copies();
    if (staged == 0) continue;
    const int step = staged - 1;
    wait_for_copies<1>();
    __syncthreads();
    const T* panel = staging + (step % kStages * kRows + group * kPanel) * kStride;
    for (int k = 0; tile && k < kStep && step * kStep + k < depth; k += F::kDepth) {
      const typename F::Left a = F::left(tile + step * kStep + k, stride);
#pragma unroll
      for (int n = 0; n < kPanelTiles; n += 2) {
        typename F::Right b[2];
        F::right(b, panel + n * 8 * kStride + k, kStride);
        F::multiply(to[n], a, b[0]);
        F::multiply(to[n + 1], a, b[1]);
      }
    }
    __syncthreads();
  }
}

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
    T pair[2];
    for (int i = 0; i < 2; ++i) pair[i] = from_float<T>(c + i < count ? values[i] : 0.0f);
    memcpy(tile + r * stride + c, pair, sizeof(pair));
  });
}

// Adds the residual to a warp's rows of a tile and writes them out: `columns` values of the row that begins at
// `offset(row)` in both, nothing where that is negative. `note` sees every result.
template <class T, class Offset, class Note>
__device__ void write_rows(const T* tile, int stride, int columns, void* out, DType dtype, const Array& residual,
                           const Offset& offset, const Note& note) {
#pragma unroll 1
  for (int r = 0; r < 16; ++r) {
    const int64_t first = offset(r);
    if (first < 0) continue;
#pragma unroll 1
    for (int c = lane_index(); c < columns; c += kWarp) {
      const float value = to_float(tile[r * stride + c]) + load_or<T>(residual, first + c, 0.0f);
      store<T>(out, dtype, first + c, value);
      note(value);
    }
  }
}

}  // namespace fk
