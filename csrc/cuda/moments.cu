// normalization.group_statistics: each sample's values in parts, then the parts.
#include "moments.h"

namespace fk {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kShared = kThreads / kWarp * sizeof(Spread);

template <class T>
__global__ void __launch_bounds__(kThreads) moments_kernel(const Moments p) {
  const int64_t sample = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  const int64_t begin = part * p.values_per_part;
  const int64_t end = begin + p.values_per_part < p.values ? begin + p.values_per_part : p.values;
  const bool vectors = p.x.aligned && p.sample_stride % kVector<T> == 0 && p.values % kVector<T> == 0 &&
                       p.values_per_part % kVector<T> == 0;
  SpreadSums sums;
  for (int64_t i = begin + threadIdx.x * kVector<T>; i < end; i += kThreads * kVector<T>) {
    const int count = end - i < kVector<T> ? static_cast<int>(end - i) : kVector<T>;
    float values[kVector<T>];
    load_values<T>(values, p.x, sample * p.sample_stride + i, count, vectors);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j)
      if (j < count) sums.add(values[j]);
  }
  const Spread all = merge_block(sums.result(), reinterpret_cast<Spread*>(shared_memory()));
  if (threadIdx.x == 0) reinterpret_cast<Spread*>(p.moments)[blockIdx.x] = all;
}

__global__ void __launch_bounds__(kThreads) merge_moments_kernel(const MergeMoments p) {
  const Spread* parts = reinterpret_cast<const Spread*>(p.moments) + int64_t{blockIdx.x} * p.parts;
  Spread mine = {0.0f, 0.0f, 0.0f};
  for (int part = threadIdx.x; part < p.parts; part += kThreads) mine.merge(parts[part]);
  const Spread all = merge_block(mine, reinterpret_cast<Spread*>(shared_memory()));
  if (threadIdx.x == 0) {
    p.statistics[2 * blockIdx.x] = all.mean;
    p.statistics[2 * blockIdx.x + 1] = all.squares / all.count;
  }
}

}  // namespace

const char* launch(const Moments& p, void* stream) {
  const auto kernel = p.x.dtype == kF32    ? moments_kernel<float>
                      : p.x.dtype == kBF16 ? moments_kernel<bf16>
                                           : moments_kernel<f16>;
  return launch_kernel(kernel, int64_t{p.samples} * p.parts, kThreads, kShared, stream, p);
}

const char* launch(const MergeMoments& p, void* stream) {
  return launch_kernel(merge_moments_kernel, p.samples, kThreads, kShared, stream, p);
}

}  // namespace fk
