// What forward and backward of local_attention share: its arguments, checked, and the forward itself.
#pragma once

#include <string>
#include <tuple>

#include "norms.h"
#include "packed.h"

namespace fk::local {

enum Index {
  kX,
  kK,
  kV,
  kNormWeight,
  kNormBias,
  kStatistics,
  kQkv,
  kQkvBias,
  kBias,
  kProj,
  kProjBias,
  kResidual,
  kCount
};

struct Attention {
  fk_array norm_weight, norm_bias, qkv, qkv_bias, bias, proj, proj_bias;
  int64_t batch, tokens, in_channels, channels, value_channels, out, heads, area;
  fk_norm_kind norm;
  double norm_eps;
  bool low_precision;
  uint64_t mark;
};

// Raises unless tensors and options go together. Weights in other layouts are replaced by row-major copies.
Attention check(TensorList& t, const std::optional<Tensor>& packed, const std::string& norm, double norm_eps,
                int64_t height, int64_t width, int64_t window, int64_t heads, const std::string& pad, ScalarType dtype);

// The result and its statistics, if wanted.
std::tuple<Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::string norm, double norm_eps,
                               int64_t height, int64_t width, int64_t window, int64_t heads, double scale,
                               std::string pad, bool return_statistics, ScalarType dtype);

}  // namespace fk::local
