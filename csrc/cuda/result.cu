// What follows the results of all blocks: a GroupNorm of a sample's map, and the mean of its pixels.
#include "moments.h"
#include "rows.h"

namespace fk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kShared = kWarps * sizeof(Spread);

// Mean and factor of a sample.
__device__ float2 spread_of(const Norm& norm, int64_t sample) {
  return make_float2(norm.statistics[2 * sample], rsqrtf(norm.statistics[2 * sample + 1] + norm.eps));
}

template <class T>
__device__ float normalized(const Norm& norm, float2 spread, int channel, float value) {
  return (value - spread.x) * spread.y * load_or<T>(norm.weight, channel, 1.0f) + load_or<T>(norm.bias, channel, 0.0f);
}

template <class T>
__global__ void __launch_bounds__(kThreads) result_norm_kernel(const ResultNorm p) {
  const int blocks = parts(p.tokens, p.rows_per_block);
  const int64_t sample = blockIdx.x / blocks;
  const int begin = static_cast<int>(blockIdx.x % blocks) * p.rows_per_block;
  const float2 spread = spread_of(p.norm, sample);
  const bool vectors = p.channels % kVector<T> == 0 && p.y.aligned && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 &&
                       (!p.residual.data || p.residual.aligned);
  const int pieces = parts(p.channels, kVector<T>), rows = min(p.rows_per_block, p.tokens - begin);
  SpreadSums sums;
  for (int piece = threadIdx.x; piece < rows * pieces; piece += kThreads) {
    const int row = begin + piece / pieces, c = piece % pieces * kVector<T>, count = min(p.channels - c, kVector<T>);
    const int64_t index = (sample * p.tokens + row) * p.channels + c;
    float values[kVector<T>] = {}, y[kVector<T>];
    if (p.residual.data) load_values<T>(values, p.residual, index, count, vectors);
    if (row >= p.prefix) {
      load_values<T>(y, p.y, index, count, vectors);
      const RowAffine<T> affine(p.norm, c, p.channels);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        if (i >= count) break;
        values[i] += (y[i] - spread.x) * spread.y * affine.weight[i] + affine.bias[i];
        sums.add(values[i]);
      }
    }
    store_values<T>(p.out, p.out_dtype, index, values, count, vectors);
  }
  if (p.moments) {
    const Spread all = merge_block(sums.result(), reinterpret_cast<Spread*>(shared_memory()));
    if (threadIdx.x == 0) reinterpret_cast<Spread*>(p.moments)[blockIdx.x] = all;
  }
}

// A thread has a column of a sample.
template <class T>
__global__ void __launch_bounds__(kThreads) merge_sums_kernel(const MergeSums p) {
  const int blocks = parts(p.columns, kThreads);
  const int64_t sample = blockIdx.x / blocks;
  const int column = static_cast<int>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  if (column >= p.columns) return;
  float sum = 0.0f;
  for (int part = 0; part < p.parts; ++part) sum += p.sums[(sample * p.parts + part) * p.columns + column];
  float mean = sum / p.rows;
  if (p.norm.kind == kGroupNorm) mean = normalized<T>(p.norm, spread_of(p.norm, sample), column, mean);
  p.means[sample * p.columns + column] = mean;
}

}  // namespace

const char* launch(const ResultNorm& p, void* stream) {
  const auto kernel = p.dtype == kF32    ? result_norm_kernel<float>
                      : p.dtype == kBF16 ? result_norm_kernel<bf16>
                                         : result_norm_kernel<f16>;
  return launch_kernel(kernel, int64_t{p.batch} * parts(p.tokens, p.rows_per_block), kThreads, kShared, stream, p);
}

const char* launch(const MergeSums& p, void* stream) {
  const auto kernel = p.dtype == kF32    ? merge_sums_kernel<float>
                      : p.dtype == kBF16 ? merge_sums_kernel<bf16>
                                         : merge_sums_kernel<f16>;
  return launch_kernel(kernel, int64_t{p.samples} * parts(p.columns, kThreads), kThreads, int64_t{0}, stream, p);
}

}  // namespace fk
