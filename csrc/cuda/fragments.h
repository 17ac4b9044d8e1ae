// Products of tiles in shared memory, 16 rows of 32 bytes at a time, for every compute dtype.
//
// Accumulators are float[4] for 16 x 8 results: of the lane's row lane / 4 the columns 2 * (lane % 4) and the next,
// then the same of the row 8 below. Rows of a tile are `stride` values apart, an odd multiple of 16 bytes, so that 8 of
// them meet no bank of shared memory twice.
#pragma once

#include "ptx.h"

namespace fk {

// bf16 and fp16.
template <class T>
struct Fragments {
  static constexpr int kDepth = 16;  // values of the inner dimension that one product takes
  static constexpr int kTiles = 2;   // accumulators that make the left factor of the next product
  struct Left {
    uint32_t x[4];
  };
  struct Right {
    uint32_t x[2];
  };

  // 16 rows of a tile [rows, depth] from `tile` on.
  static __device__ Left left(const T* tile, int stride) {
    Left a;
    const int lane = lane_index();
    load_matrices(a.x, tile + lane % 16 * stride + lane / 16 * 8);
    return a;
  }

  // 16 columns, which are the rows of a tile [columns, depth].
  static __device__ void right(Right (&b)[2], const T* tile, int stride) {
    uint32_t x[4];
    const int lane = lane_index();
    load_matrices(x, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    b[0] = {{x[0], x[1]}};
    b[1] = {{x[2], x[3]}};
  }

  // 16 columns of a tile [depth, columns], in the order of depth that `left_of` has.
  static __device__ void right_of_rows(Right (&b)[2], const T* tile, int stride) {
    uint32_t x[4];
    const int lane = lane_index();
    load_matrices_transposed(x, tile + lane % 16 * stride + lane / 16 * 8);
    b[0] = {{x[0], x[1]}};
    b[1] = {{x[2], x[3]}};
  }

  // `kTiles` neighbouring accumulators as a left factor.
  static __device__ Left left_of(const float (*c)[4]) {
    return {
        {pack<T>(c[0][0], c[0][1]), pack<T>(c[0][2], c[0][3]), pack<T>(c[1][0], c[1][1]), pack<T>(c[1][2], c[1][3])}};
  }

  static __device__ void multiply(float (&to)[4], const Left& a, const Right& b);
};

template <>
__device__ inline void Fragments<bf16>::multiply(float (&to)[4], const Left& a, const Right& b) {
  multiply_bf16(to, a.x, b.x);
}

template <>
__device__ inline void Fragments<f16>::multiply(float (&to)[4], const Left& a, const Right& b) {
  multiply_f16(to, a.x, b.x);
}

// fp32 without tensor cores, which would cut its operands to tf32: every lane multiplies for its own accumulators.
template <>
struct Fragments<float> {
  static constexpr int kDepth = 8;
  static constexpr int kTiles = 1;
  // Rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and the next.
  struct Left {
    float x[2][kDepth];
  };
  struct Right {
    float x[2][kDepth];
  };

  static __device__ Left left(const float* tile, int stride) {
    Left a;
    for (int i = 0; i < 2; ++i) load_row(a.x[i], tile + (lane_index() / 4 + 8 * i) * stride);
    return a;
  }

  static __device__ void right(Right (&b)[2], const float* tile, int stride) {
    for (int i = 0; i < 4; ++i) load_row(b[i / 2].x[i % 2], tile + (i / 2 * 8 + lane_index() % 4 * 2 + i % 2) * stride);
  }

  static __device__ void right_of_rows(Right (&b)[2], const float* tile, int stride) {
    for (int k = 0; k < kDepth; ++k)
      for (int i = 0; i < 2; ++i) {
        const float2 values = *reinterpret_cast<const float2*>(tile + k * stride + i * 8 + lane_index() % 4 * 2);
        b[i].x[0][k] = values.x;
        b[i].x[1][k] = values.y;
      }
  }

  static __device__ Left left_of(const float (*c)[4]) {
    Left a;
    for (int k = 0; k < kDepth; ++k)
      for (int i = 0; i < 2; ++i) a.x[i][k] = __shfl_sync(~0u, c[0][2 * i + k % 2], lane_index() / 4 * 4 + k / 2);
    return a;
  }

  static __device__ void multiply(float (&to)[4], const Left& a, const Right& b) {
    // Sums of their own: a long one is then rounded less often.
    for (int i = 0; i < 4; ++i) {
      float sum = a.x[i / 2][0] * b.x[i % 2][0];
      for (int k = 1; k < kDepth; ++k) sum = fmaf(a.x[i / 2][k], b.x[i % 2][k], sum);
      to[i] += sum;
    }
  }

 private:
  static __device__ void load_row(float (&to)[kDepth], const float* row) {
    for (int k = 0; k < kDepth; k += 4) {
      const float4 values = *reinterpret_cast<const float4*>(row + k);
      to[k] = values.x;
      to[k + 1] = values.y;
      to[k + 2] = values.z;
      to[k + 3] = values.w;
    }
  }
};

}  // namespace fk
