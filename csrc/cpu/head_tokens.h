// What forward and backward of head_tokens share: its arguments, checked.
#pragma once

#include "packed.h"

namespace fk::heads {

enum Index { kX, kNormWeight, kNormBias, kWeight, kBias, kHeadNormWeight, kHeadNormBias, kPosEmbed, kCount };

struct Heads {
  fk_array norm_weight, norm_bias, weight, bias, head_norm_weight, head_norm_bias, pos_embed;
  int64_t batch, tokens, channels, heads;
  std::optional<double> norm_eps;
  double head_norm_eps;
  bool low_precision;
  uint64_t mark;
};

// Raises unless tensors and numbers go together. Weights in other layouts are replaced by row-major copies.
Heads check(TensorList& t, const std::optional<Tensor>& packed, int64_t heads, std::optional<double> norm_eps,
            double head_norm_eps, ScalarType dtype);

// Sizes, and the tasks of the first step.
void set_geometry(const Heads& e, fk_head_tokens* to);

}  // namespace fk::heads
