// What forward and backward of depthwise_mlp share: its arguments, checked.
#pragma once

#include <string>
#include <vector>

#include "norms.h"
#include "packed.h"

namespace fk::mlp {

enum Index {
  kX = 0,
  kNormWeight = 1,
  kNormBias = 2,
  kStatistics = 3,
  kExpand = 4,
  kExpandBias = 5,
  kBn1 = 6,
  kFilter = 10,
  kFilterBias = 11,
  kBn2 = 12,
  kProject = 16,
  kProjectBias = 17,
  kBn3 = 18,
  kOutNormWeight = 22,
  kOutNormBias = 23,
  kResidual = 24,
  kCount = 25
};

struct Mlp {
  fk_array norm_weight, norm_bias, expand, expand_bias, filter, filter_bias, project, project_bias;
  fk_array out_norm_weight, out_norm_bias;
  BatchNorm bn[3];
  fk_norm_kind norm;
  double norm_eps;
  bool bn_after_activation, low_precision, adds_input;
  std::optional<double> out_norm_eps;
  int64_t batch, tokens, channels, hidden, out, kernel;
  uint64_t mark;

  BatchNorm before_hidden_activation() const { return bn_after_activation ? BatchNorm{} : bn[0]; }
  BatchNorm after_hidden_activation() const { return bn_after_activation ? bn[0] : BatchNorm{}; }
  BatchNorm before_activation() const { return bn_after_activation ? BatchNorm{} : bn[1]; }
  BatchNorm after_activation() const { return bn_after_activation ? bn[1] : BatchNorm{}; }
};

// What the operator was called with besides tensors.
struct Options {
  std::string norm;
  double norm_eps;
  std::string hidden_activation, activation, inner_residual;
  bool bn_after_activation;
  std::vector<double> bn_eps;
  std::optional<double> out_norm_eps;
  int64_t height, width, prefix;
  std::string summary;
  ScalarType dtype;
};

// Raises unless tensors and options go together. Weights in other layouts are replaced by row-major copies.
Mlp check(TensorList& tensors, const std::optional<Tensor>& packed, const Options& options);

// What a forward gives.
struct Outputs {
  Tensor out, summary;
  Tensor raw;  // [B, H * W, N] in fp32: the branch in front of its own GroupNorm; empty where there is none
};
// `out_dtype`: of the result; none: the compute dtype, promoted with the residual's.
Outputs forward(TensorList& tensors, const std::optional<Tensor>& packed, const Options& options,
                std::optional<ScalarType> out_dtype);

}  // namespace fk::mlp
