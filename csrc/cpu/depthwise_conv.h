// What forward and backward of depthwise_conv share: its arguments, checked.
#pragma once

#include "packed.h"

namespace fk::depthwise {

enum Index { kX = 0, kWeight = 1, kBias = 2, kNormWeight = 3, kNormBias = 4, kBn = 5, kResidual = 9, kCount = 10 };

struct Convolution {
  fk_array weight, bias, norm_weight, norm_bias;
  BatchNorm bn;
  std::optional<double> norm_eps;
  int64_t batch, height, width, channels, kernel;
  uint64_t mark;
};

// Raises unless tensors and numbers go together. Weights in other layouts are replaced by row-major copies.
Convolution check(TensorList& t, const std::optional<Tensor>& packed, std::optional<double> norm_eps, double bn_eps,
                  int64_t height, int64_t width, int64_t stride, int64_t padding);

// The convolution, without the norm behind it, as the only branch of a convolutional projection: the others have no
// results. Its bands do not depend on the number of threads.
void set_branch(const Convolution& c, const Tensor& x, int64_t stride, int64_t padding, fk_conv_projection* to);
Tensor pack_branch(const Convolution& c, fk_conv_projection* to);

}  // namespace fk::depthwise
