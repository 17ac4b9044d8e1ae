// Batch normalisation as the kernels of a backward read it.
#pragma once

#include "norm_gradients.h"

namespace fk {

// A batch norm's vectors, padded with zeros. Those of the batch are filled in as they become known.
struct ChannelNorm {
  ChannelNorm(const BatchNorm& bn, int64_t n, int64_t padded, bool of_batch, Memory* memory);
  void set_statistics(int64_t channel, double mean, double variance);
  // Sums over `count` values of the gradient behind the norm, alone and times the normalised value, and of the latter.
  // Their mean is zero but for the rounding of the statistics, which is made up for: it would not average out.
  void set_gradients(const std::vector<double>& alone, const std::vector<double>& times,
                     const std::vector<double>& values, double count);
  // For rows that are as wide as several of n channels: the vectors once more behind each other, `columns` in all.
  void repeat(int64_t n, int64_t columns);

  fk_channel_norm vectors = {};
  float *mean = nullptr, *rstd = nullptr, *rest = nullptr;
  float *grad_mean = nullptr, *grad_slope = nullptr;
  double eps;
  int64_t padded;
};

}  // namespace fk
