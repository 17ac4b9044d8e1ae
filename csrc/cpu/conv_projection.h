// What forward and backward of conv_projection share: its arguments, checked, and the geometry of its branches.
#pragma once

#include "packed.h"

namespace fk::projection {

constexpr int kBranches = 3, kPerBranch = 7, kFirstBranch = 3;

// What the operator was called with besides tensors.
struct Options {
  std::optional<double> norm_eps;
  std::vector<double> bn_eps;
  int64_t height, width, prefix;
  std::vector<int64_t> stride, padding;
  ScalarType dtype;
};

struct Branch {
  fk_array filter, weight, bias;
  BatchNorm bn;
  int64_t kernel, out;
};

struct Projection {
  fk_array norm_weight, norm_bias;
  std::optional<double> norm_eps;
  Branch branch[kBranches];
  int64_t batch, tokens, channels;
  bool low_precision;
  uint64_t mark;
};

// Raises unless tensors and options go together. Weights in other layouts are replaced by row-major copies.
Projection check(TensorList& tensors, const std::optional<Tensor>& packed, const Options& options);

// Everything about input and branches but their weights; the bands are left to the caller.
void set_geometry(const Projection& p, const Options& options, const Tensor& x, fk_conv_projection* to);
// Rows of a band that stay in the cache.
int64_t cached_rows(const Projection& p, int64_t width);

// The filter of a branch, with its batch normalisation or bare.
void describe_filter(Packer& packer, const Projection& p, int branch, bool normalized, fk_conv_branch* to);

}  // namespace fk::projection
