// A depthwise convolution on a patch of the map in shared memory, 64 channels at a time: a lane has two of them, and a
// warp makes results side by side, which share what they read.
#pragma once

#include "tiles.h"

namespace fk {

constexpr int kChannels = kFilteredChannels;
static_assert(kChannels == 2 * kWarp);

template <class T>
__device__ float scale_of(const BatchNorm& norm, int channel) {
  return norm.mean.data ? rsqrtf(load<T>(norm.variance, channel) + norm.eps) * load_or<T>(norm.weight, channel, 1.0f)
                        : 1.0f;
}

template <class T>
__device__ float shift_of(const BatchNorm& norm, int channel, float scale) {
  return norm.mean.data ? load_or<T>(norm.bias, channel, 0.0f) - load<T>(norm.mean, channel) * scale : 0.0f;
}

constexpr int kRun = 8;

// The results of a tile, by rows of the map, in runs of about equal length.
struct Runs {
  int tile_width, across, width, count;

  __device__ Runs(int tile_height, int tile_width) : tile_width(tile_width) {
    across = parts(tile_width, kRun);
    width = parts(tile_width, across);
    count = tile_height * across;
  }
  __device__ int row(int run) const { return run / across; }
  __device__ int column(int run) const { return run % across * width; }
  __device__ int size(int run) const { return min(width, tile_width - column(run)); }
};

// Every pixel that the run's filters cover is read once for the row of taps that it meets.
template <int kKernel, int kStride, class T>
__device__ void add_run(float2 (&results)[kRun], const T* patch, int stride, int patch_width, int size,
                        const float* factors) {
#pragma unroll
  for (int y = 0; y < kKernel; ++y) {
    float2 row[kKernel];
#pragma unroll
    for (int x = 0; x < kKernel; ++x) row[x] = load_pair(factors + (y * kKernel + x) * kChannels);
#pragma unroll
    for (int c = 0; c < (kRun - 1) * kStride + kKernel; ++c) {
      if (c >= (size - 1) * kStride + kKernel) break;
      const float2 pair = load_pair(patch + (y * patch_width + c) * stride);
#pragma unroll
      for (int x = 0; x < kKernel; ++x) {
        const int i = (c - x) / kStride;
        if (c < x || (c - x) % kStride || i >= kRun) continue;
        results[i].x = fmaf(row[x].x, pair.x, results[i].x);
        results[i].y = fmaf(row[x].y, pair.y, results[i].y);
      }
    }
  }
}

// Adds to the results of a run what they gather under the filter: the first one from `patch` on, the others `step`
// pixels further each. `factors` has a row of 64 channels for each tap; all begin at the lane's own channels.
template <class T>
__device__ void add_filtered(float2 (&results)[kRun], const T* patch, int stride, int patch_width, int size, int step,
                             const float* factors, int kernel) {
  if (kernel == 3 && step == 1) return add_run<3, 1>(results, patch, stride, patch_width, size, factors);
  if (kernel == 3 && step == 2) return add_run<3, 2>(results, patch, stride, patch_width, size, factors);
#pragma unroll 1
  for (int tap = 0; tap < kernel * kernel; ++tap) {
    const int offset = tap / kernel * patch_width + tap % kernel;
    const float2 factor = load_pair(factors + tap * kChannels);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float2 pair = load_pair(patch + (offset + min(i, size - 1) * step) * stride);
      results[i].x = fmaf(factor.x, pair.x, results[i].x);
      results[i].y = fmaf(factor.y, pair.y, results[i].y);
    }
  }
}

}  // namespace fk
