// A depthwise convolution on a patch of the map in shared memory, 64 channels at a time: a lane has two of them.
#pragma once

#include "tiles.h"

namespace fk {

constexpr int kChannels = 2 * kWarp;

template <class T>
__device__ float scale_of(const BatchNorm& norm, int channel) {
  return norm.mean.data ? rsqrtf(load<T>(norm.variance, channel) + norm.eps) * load_or<T>(norm.weight, channel, 1.0f)
                        : 1.0f;
}

template <class T>
__device__ float shift_of(const BatchNorm& norm, int channel, float scale) {
  return norm.mean.data ? load_or<T>(norm.bias, channel, 0.0f) - load<T>(norm.mean, channel) * scale : 0.0f;
}

template <class T>
__device__ float2 load_pair(const T* from) {
  return make_float2(to_float(from[0]), to_float(from[1]));
}

template <class T>
__device__ void store_pair(T* to, float first, float second) {
  const T pair[2] = {from_float<T>(first), from_float<T>(second)};
  memcpy(to, pair, sizeof(pair));
}

// What a warp's results, which begin at these corners of the patch, gather under the filter. `factors` has a row of 64
// channels for each tap.
template <class T, int kResults>
__device__ void add_filtered(float2 (&results)[kResults], const T* patch, int stride, int patch_width,
                             const int (&corners)[kResults], const float* factors, int kernel) {
  const int own = 2 * lane_index();
#pragma unroll 1
  for (int tap = 0; tap < kernel * kernel; ++tap) {
    const int offset = tap / kernel * patch_width + tap % kernel;
    const float2 factor = load_pair(factors + tap * kChannels + own);
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const float2 pair = load_pair(patch + (corners[i] + offset) * stride + own);
      results[i].x = fmaf(factor.x, pair.x, results[i].x);
      results[i].y = fmaf(factor.y, pair.y, results[i].y);
    }
  }
}

}  // namespace fk
