#include <tuple>

#include "support.h"

namespace fk {
namespace {

enum Index {
  kX,
  kNormWeight,
  kNormBias,
  kStatistics,
  kExpand,
  kExpandBias,
  kFirstNorm,
  kFilter = 10,
  kFilterBias,
  kSecondNorm,
  kProject = 16,
  kProjectBias,
  kThirdNorm,
  kOutNormWeight = 22,
  kOutNormBias,
  kResidual,
  kCount
};

Activation activation(const std::string& name) {
  if (name == "gelu") return kGelu;
  if (name == "quick_gelu") return kQuickGelu;
  if (name == "silu") return kSilu;
  if (name == "relu") return kRelu;
  STD_TORCH_CHECK(name == "none", "activation: unknown name");
  return kIdentity;
}

std::tuple<Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::string norm, double norm_eps,
                               std::string hidden_activation, std::string last_activation, std::string inner_residual,
                               bool bn_after_activation, std::vector<double> bn_eps, bool training,
                               std::optional<double> out_norm_eps, int64_t height, int64_t width, int64_t prefix,
                               std::string summary, ScalarType dtype) {
  check_count(t, kCount);
  STD_TORCH_CHECK(!packed.has_value(), "packed: the CUDA kernels read the weights themselves");
  const Tensor& x = required(t, kX, "x");
  STD_TORCH_CHECK(x.dim() == 3 && on_device(x), "x: expected 3 dimensions on a CUDA device");
  STD_TORCH_CHECK(
      !training && !out_norm_eps.has_value() && prefix == 0 && summary != "mean" && bn_eps.size() == 3,
      "depthwise_mlp: the CUDA kernels have no batch statistics, prefix tokens, norm of the result or mean");
  STD_TORCH_CHECK(height > 0 && width > 0 && height < (int64_t{1} << 31) / width && height * width == x.size(1),
                  "grid: does not make the tokens of x");
  STD_TORCH_CHECK(
      inner_residual == "none" || inner_residual == "before_activation" || inner_residual == "after_activation",
      "inner_residual: unknown name");
  const Tensor &expand = required(t, kExpand, "fc1_weight"), &project = required(t, kProject, "fc2_weight");
  const Tensor& filter = required(t, kFilter, "dw_weight");
  STD_TORCH_CHECK(expand.dim() == 2 && project.dim() == 2 && filter.dim() == 4, "weights: unexpected dimensions");
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const int64_t hidden = expand.size(0), out_channels = project.size(0), kernel = filter.size(2);
  STD_TORCH_CHECK(channels > 0 && hidden > 0 && out_channels > 0 && out_channels <= 384,
                  "fc2_weight: expected 1 to 384 rows");
  STD_TORCH_CHECK(kernel % 2 == 1 && kernel <= 7, "dw_weight: expected a filter of 1, 3, 5 or 7");

  DepthwiseMlp p = {};
  Views views(x, dtype);
  const Stream stream(x);
  p.dtype = kernel_dtype(dtype);
  p.batch = static_cast<int32_t>(batch);
  p.height = static_cast<int32_t>(height);
  p.width = static_cast<int32_t>(width);
  p.kernel = static_cast<int32_t>(kernel);
  p.x = views.array(x, "x", {batch, tokens, channels});
  p.norm.kind = norm_kind(norm);
  p.norm.eps = static_cast<float>(norm_eps);
  p.norm.weight = views.array(t[kNormWeight], "norm_weight", {channels});
  p.norm.bias = views.array(t[kNormBias], "norm_bias", {channels});
  std::optional<Tensor> statistics;
  if (p.norm.kind == kGroupNorm) {
    statistics = group_statistics(stream, t[kStatistics], x, 0);
    p.norm.statistics = static_cast<const float*>(statistics->const_data_ptr());
  }
  p.expand = views.linear(expand, t[kExpandBias], "fc1_weight", hidden, channels);
  p.project = views.linear(project, t[kProjectBias], "fc2_weight", out_channels, hidden);
  p.filter = views.array(filter, "dw_weight", {hidden, 1, kernel, kernel});
  p.filter_bias = views.array(t[kFilterBias], "dw_bias", {hidden});
  const size_t firsts[3] = {kFirstNorm, kSecondNorm, kThirdNorm};
  for (int i = 0; i < 3; ++i) {
    const int64_t size = i == 2 ? out_channels : hidden;
    const std::optional<Tensor>* own = &t[firsts[i]];
    STD_TORCH_CHECK(own[2].has_value() == own[3].has_value(), "bn: expected a mean and a variance, or none");
    p.norms[i] = {views.array(own[0], "bn.weight", {size}), views.array(own[1], "bn.bias", {size}),
                  views.array(own[2], "bn.running_mean", {size}), views.array(own[3], "bn.running_var", {size}),
                  static_cast<float>(bn_eps[i])};
  }
  p.norms_follow_activation = bn_after_activation;
  p.hidden_activation = activation(hidden_activation);
  p.activation = activation(last_activation);
  p.adds_before = inner_residual == "before_activation";
  p.adds_after = inner_residual == "after_activation";
  p.residual = views.array(t[kResidual], "residual", {batch, tokens, out_channels});
  p.vectors = views.vectors({channels, hidden});
  int64_t side = kMostSide;
  while ((side + kernel - 1) * (side + kernel - 1) > kPatchRows) --side;
  p.tile_height = tile_side(height, side);
  p.tile_width = tile_side(width, side);
  const ScalarType out_dtype = promoted(dtype, t[kResidual]);
  p.out_dtype = kernel_dtype(out_dtype);
  const Tensor out = empty(x, {batch, tokens, out_channels}, out_dtype);
  p.out = out.mutable_data_ptr();
  STD_TORCH_CHECK(shared_bytes(p) <= kMostShared, "depthwise_mlp: a block needs ", shared_bytes(p),
                  " bytes of shared memory, and has at most ", kMostShared);
  const bool wants_statistics = summary == "statistics";
  Tensor moments = empty(x, {wants_statistics ? batch : 0, blocks_per_sample(p), 3}, ScalarType::Float);
  if (wants_statistics) p.moments = static_cast<float*>(moments.mutable_data_ptr());
  stream.run(p);
  return {out, wants_statistics ? merged_statistics(stream, moments, batch) : empty(x, {0}, ScalarType::Float)};
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(FK_LIBRARY, FK_DISPATCH_KEY, m) { m.impl("depthwise_mlp", TORCH_BOX(&fk::run)); }
