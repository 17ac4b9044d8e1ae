// Number, mean and sum of squared deviations of many values, in parts that are merged in a fixed order.
#pragma once

#include "device.h"

namespace fk {

struct Spread {
  float count, mean, squares;

  __device__ void merge(const Spread& other) {
    const float all = count + other.count;
    if (all == 0.0f) return;
    const float share = other.count / all, shift = other.mean - mean;
    mean += shift * share;
    squares += other.squares + shift * shift * (count * share);
    count = all;
  }
};

// A thread's own values: sums of their distances from the first one, which keeps the digits when they are far from 0.
class SpreadSums {
 public:
  __device__ void add(float value) {
    if (count_ == 0.0f) origin_ = value;
    const float distance = value - origin_;
    count_ += 1.0f;
    sum_ += distance;
    squares_ += distance * distance;
  }

  __device__ Spread result() const {
    if (count_ == 0.0f) return {0.0f, 0.0f, 0.0f};
    const float mean = sum_ / count_;
    return {count_, origin_ + mean, fmaxf(squares_ - sum_ * mean, 0.0f)};
  }

 private:
  float count_ = 0.0f, origin_ = 0.0f, sum_ = 0.0f, squares_ = 0.0f;
};

// Merges the spreads of a block's threads; thread 0 returns the result. `memory` holds one spread of each warp and is
// free to be written when this is called.
__device__ inline Spread merge_block(Spread spread, Spread* memory) {
  for (int step = 1; step < kWarp; step *= 2) {
    Spread other;
    other.count = __shfl_xor_sync(~0u, spread.count, step);
    other.mean = __shfl_xor_sync(~0u, spread.mean, step);
    other.squares = __shfl_xor_sync(~0u, spread.squares, step);
    spread.merge(other);
  }
  if (lane_index() == 0) memory[warp_index()] = spread;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) spread.merge(memory[warp]);
  return spread;
}

}  // namespace fk
