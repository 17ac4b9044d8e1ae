// The weights of a block's linear layers on their way through shared memory, in tiles of 64 rows and 128 bytes of each,
// and the products of a block's rows with one such tile.
#pragma once

#include "tiles.h"

namespace fk {

constexpr int kWeightRows = 64;
// Bytes of a weight's row that are in shared memory at a time, and of a row there.
constexpr int kStageBytes = 128;
constexpr int kStageRowBytes = kStageBytes + 16;
// Of `slots` tiles, one in work and the others on their way.
__host__ __device__ constexpr int weight_tiles_bytes(int slots) { return slots * kWeightRows * kStageRowBytes; }

// Where a tile lies: `rows` rows of `columns` values, `stride` apart; none when `from` is null.
template <class T>
struct WeightTile {
  const T* from;
  int rows, columns;
  int64_t stride;
};

// Copies tiles in the order in which `Source` names them, `kSlots - 1` ahead of the one in work, across the end of one
// layer and the beginning of the next. All threads of a block take part.
template <class T, class Source, int kSlots>
class WeightTiles {
 public:
  static constexpr int kDepth = kStageBytes / sizeof(T);
  static constexpr int kStride = kStageRowBytes / sizeof(T);

  // `memory` has `weight_tiles_bytes(kSlots)` that are free to be written.
  __device__ WeightTiles(T* memory, const Source& source) : memory_(memory), source_(source) {
#pragma unroll 1
    for (int slot = 0; slot + 1 < kSlots; ++slot) begin(slot);
  }

  // The next tile. Every thread of the block is past its last look at the one before.
  __device__ const T* next() {
    wait_for_copies<kSlots - 2>();
    __syncthreads();
    begin(used_ == 0 ? kSlots - 1 : used_ - 1);
    const T* tile = memory_ + used_ * (kWeightRows * kStride);
    used_ = used_ + 1 == kSlots ? 0 : used_ + 1;
    return tile;
  }

 private:
  __device__ void begin(int slot) {
    const WeightTile<T> tile = source_.next();
    if (tile.from)
      fill_tile(memory_ + slot * (kWeightRows * kStride), kStride, kWeightRows, tile.columns, kDepth, source_.vectors(),
                tile.from, [&](int r) { return r < tile.rows ? r * tile.stride : int64_t{-1}; });
    end_copies();
  }

  T* memory_;
  Source source_;
  int used_ = 0;
};

// How `kWarps` warps share the products of up to 16 * kRowTiles * kDown rows with 64 columns: each has so many.
template <int kWarps, int kDown, int kRowTiles>
struct WarpShare {
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kColumns = kWeightRows / (kWarps / kDown);
  static constexpr int kColumnTiles = kColumns / 8;

  __device__ static int first_row() { return warp_index() % kDown * kRows; }
  __device__ static int first_column() { return warp_index() / kDown * kColumns; }
};

// to += rows * tile^T for a warp's rows, 16 of them at each of `rows`, and the columns from the tile's row
// `first_column` on, over at most a tile's depth, of which `depth` are there: all that follows it in `rows` are zeros.
template <class T, int kRowTiles, int kColumnTiles>
__device__ void multiply_tile(float (&to)[kRowTiles][kColumnTiles][4], const T* const (&rows)[kRowTiles], int stride,
                              const T* tile, int first_column, int depth) {
  using F = Fragments<T>;
  constexpr int kStride = kStageRowBytes / sizeof(T);
  constexpr int kDepth = kStageBytes / sizeof(T);
#pragma unroll
  for (int k = 0; k < kDepth; k += F::kDepth) {
    if (k >= depth) break;
    typename F::Left a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) a[i] = F::left(rows[i] + k, stride);
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      typename F::Right b[2];
      F::right(b, tile + (first_column + n * 8) * kStride + k, kStride);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        F::multiply(to[i][n], a[i], b[0]);
        F::multiply(to[i][n + 1], a[i], b[1]);
      }
    }
  }
}

}  // namespace fk
