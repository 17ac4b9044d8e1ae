// What the kernels around the hidden map of depthwise_mlp need to know: for its backward and for batch statistics.
#pragma once

#include "depthwise_mlp.h"
#include "norm_gradients.h"

namespace fk::mlp {

// A batch norm's vectors, padded with zeros. Those of the batch are filled in as they become known.
struct ChannelNorm {
  ChannelNorm(const BatchNorm& bn, int64_t n, int64_t padded, bool of_batch, Memory* memory);
  void set_statistics(int64_t channel, double mean, double variance);

  fk_channel_norm vectors = {};
  float *mean = nullptr, *rstd = nullptr;
  float *grad_mean = nullptr, *grad_slope = nullptr;
  double eps;
};

// Fills in sizes, activations, the norm of x, the first linear and the filter. The result holds packed weights;
// `groups` and `memory` hold the rest.
Tensor describe_hidden(const Mlp& m, const Options& o, const TensorList& t, Memory* memory, std::vector<float>* groups,
                       fk_depthwise_mlp_backward* p);

// Mean and biased variance of each channel of fp32 rows [images, skipped + rows, n], without the skipped ones.
struct ChannelStatistics {
  std::vector<double> mean, variance;
};
ChannelStatistics channel_statistics(const fk_array& x, int64_t images, int64_t skipped, int64_t rows, int64_t n);

}  // namespace fk::mlp
