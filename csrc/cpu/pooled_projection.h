// What forward and backward of pooled_projection share: its arguments, checked, its weights and the pooling itself.
#pragma once

#include "norms.h"
#include "packed.h"

namespace fk::pooled {

enum Index { kX, kInNormWeight, kInNormBias, kStatistics, kNormWeight, kNormBias, kWeight, kBias, kCount };

struct Projection {
  fk_array in_norm_weight, in_norm_bias, norm_weight, norm_bias, weight, bias;
  std::optional<double> in_norm_eps, norm_eps;
  int64_t batch, channels, out;
  bool low_precision;
  uint64_t mark;
};

// Raises unless tensors and options go together. Weights in other layouts are replaced by row-major copies.
Projection check(TensorList& t, const std::optional<Tensor>& packed, std::optional<double> in_norm_eps,
                 std::optional<double> norm_eps, int64_t height, int64_t width, int64_t kernel, bool ceil_mode,
                 ScalarType dtype);
Tensor prepare(const Projection& e, const std::optional<Tensor>& packed, fk_pooled_projection* to, bool kept = false);

// Everything about the map and its pooled pixels but the weights.
void set_geometry(const Projection& e, const Tensor& x, int64_t height, int64_t width, int64_t kernel, bool ceil_mode,
                  fk_pooled_projection* to);
// The pooled pixels [B, pooled_h * pooled_w, C] in fp32, behind `in_norm`; with `normalizes` also their statistics.
Tensor pool(fk_pooled_projection* p, bool normalizes, std::vector<double>* statistics);

}  // namespace fk::pooled
