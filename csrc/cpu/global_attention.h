// What forward and backward of global_attention share: its arguments, checked, and the forward itself.
#pragma once

#include <string>
#include <tuple>

#include "norms.h"
#include "packed.h"

namespace fk::global {

enum Index {
  kQ,
  kK,
  kV,
  kProj,
  kProjBias,
  kNormWeight,
  kNormBias,
  kQuery,
  kQueryBias,
  kBias,
  kStatistics,
  kResidual,
  kCount
};

struct Attention {
  fk_array proj, proj_bias, norm_weight, norm_bias, query, query_bias, bias;
  int64_t batch, queries, keys, q_channels, channels, value_channels, out, heads;
  fk_norm_kind norm;
  double norm_eps;
  bool low_precision;
  uint64_t mark;
};

// Raises unless tensors and options go together. Weights in other layouts are replaced by row-major copies.
Attention check(TensorList& t, const std::optional<Tensor>& packed, int64_t heads, const std::string& norm,
                double norm_eps, bool add_query_input, ScalarType dtype);

// The result and its statistics, if wanted.
std::tuple<Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, int64_t heads, double scale,
                               std::string norm, double norm_eps, bool add_query_input, bool return_statistics,
                               ScalarType dtype);

}  // namespace fk::global
