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

Activation activation(const std::string& name) { return static_cast<Activation>(activation_index(name)); }

// Values that a block normalises behind the result.
constexpr int64_t kNormedValues = 8192;

std::tuple<Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::string norm, double norm_eps,
                               std::string hidden_activation, std::string last_activation, std::string inner_residual,
                               bool bn_after_activation, std::vector<double> bn_eps, bool training,
                               std::optional<double> out_norm_eps, int64_t height, int64_t width, int64_t prefix,
                               std::string summary, ScalarType dtype) {
  check_count(t, kCount);
  STD_TORCH_CHECK(!packed.has_value(), "packed: the CUDA kernels read the weights themselves");
  const Tensor& x = required(t, kX, "x");
  check_tokens(x);
  STD_TORCH_CHECK(!training && bn_eps.size() == 3, "bn: the CUDA kernels take running statistics of three batch norms");
  check_grid(x.size(1), prefix, height, width);
  STD_TORCH_CHECK(
      inner_residual == "none" || inner_residual == "before_activation" || inner_residual == "after_activation",
      "inner_residual: unknown name");
  const Tensor &expand = required(t, kExpand, "fc1_weight"), &project = required(t, kProject, "fc2_weight");
  const Tensor& filter = required(t, kFilter, "dw_weight");
  STD_TORCH_CHECK(expand.dim() == 2 && project.dim() == 2 && filter.dim() == 4, "weights: unexpected dimensions");
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const int64_t hidden = expand.size(0), out_channels = project.size(0), kernel = filter.size(2);
  STD_TORCH_CHECK(hidden > 0 && out_channels > 0, "fc1_weight, fc2_weight: no channels");
  STD_TORCH_CHECK(kernel % 2 == 1 && kernel <= 7, "dw_weight: expected a filter of 1, 3, 5 or 7");

  DepthwiseMlp p = {};
  Views views(x, dtype);
  const Stream stream(x);
  p.dtype = kernel_dtype(dtype);
  p.batch = static_cast<int32_t>(batch);
  p.height = static_cast<int32_t>(height);
  p.width = static_cast<int32_t>(width);
  p.prefix = static_cast<int32_t>(prefix);
  p.kernel = static_cast<int32_t>(kernel);
  p.x = views.array(x, "x", {batch, tokens, channels});
  p.norm.kind = norm_kind(norm);
  p.norm.eps = static_cast<float>(norm_eps);
  p.norm.weight = views.array(t[kNormWeight], "norm_weight", {channels});
  p.norm.bias = views.array(t[kNormBias], "norm_bias", {channels});
  std::optional<Tensor> statistics;
  if (p.norm.kind == kGroupNorm) {
    statistics = group_statistics(stream, t[kStatistics], x, prefix);
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
  p.vectors = views.vectors({channels, hidden});
  choose_tile(p, most_shared_memory());
  check_shared_memory(shared_bytes(p));
  const ScalarType out_dtype = promoted(dtype, t[kResidual]);
  const Tensor out = empty(x, {batch, tokens, out_channels}, out_dtype);
  const Array residual = views.array(t[kResidual], "residual", {batch, tokens, out_channels});

  // A norm of the result waits for all blocks: the residual is added behind it.
  const bool norms = out_norm_eps.has_value(), wants_statistics = summary == "statistics";
  const Tensor result = norms ? empty(x, {batch, tokens, out_channels}, dtype) : out;
  p.out = result.mutable_data_ptr();
  p.out_dtype = kernel_dtype(norms ? dtype : out_dtype);
  if (!norms) p.residual = residual;
  Tensor moments = empty(x, {norms || wants_statistics ? batch : 0, blocks_per_sample(p), 3}, ScalarType::Float);
  if (norms || wants_statistics) p.moments = static_cast<float*>(moments.mutable_data_ptr());
  const bool wants_mean = summary == "mean";
  const Tensor sums = empty(x, {wants_mean ? batch : 0, tiles_per_sample(p), out_channels}, ScalarType::Float);
  if (wants_mean) p.sums = static_cast<float*>(sums.mutable_data_ptr());
  stream.run(p);

  Norm norm_of_result = {};
  std::optional<Tensor> statistics_of_result;
  if (norms) {
    statistics_of_result = merged_statistics(stream, moments, batch);
    norm_of_result = {kGroupNorm, views.array(t[kOutNormWeight], "out_norm_weight", {out_channels}),
                      views.array(t[kOutNormBias], "out_norm_bias", {out_channels}), static_cast<float>(*out_norm_eps),
                      static_cast<const float*>(statistics_of_result->const_data_ptr())};
    ResultNorm n = {};
    n.y = views.array(result, "y", {batch, tokens, out_channels});
    n.norm = norm_of_result;
    n.residual = residual;
    n.out = out.mutable_data_ptr();
    n.dtype = p.dtype;
    n.out_dtype = kernel_dtype(out_dtype);
    n.batch = p.batch;
    n.tokens = static_cast<int32_t>(tokens);
    n.prefix = p.prefix;
    n.channels = p.project.out;
    n.rows_per_block = static_cast<int32_t>(std::max<int64_t>(kNormedValues / out_channels, 1));
    moments = empty(x, {wants_statistics ? batch : 0, parts(tokens, n.rows_per_block), 3}, ScalarType::Float);
    if (wants_statistics) n.moments = static_cast<float*>(moments.mutable_data_ptr());
    stream.run(n);
  }
  if (wants_statistics) return {out, merged_statistics(stream, moments, batch)};
  const Tensor means =
      empty(x, wants_mean ? std::vector<int64_t>{batch, out_channels} : std::vector<int64_t>{0}, ScalarType::Float);
  if (wants_mean) {
    MergeSums m = {};
    m.sums = p.sums;
    m.norm = norm_of_result;
    m.means = static_cast<float*>(means.mutable_data_ptr());
    m.dtype = p.dtype;
    m.samples = p.batch;
    m.parts = static_cast<int32_t>(tiles_per_sample(p));
    m.columns = p.project.out;
    m.rows = p.height * p.width;
    stream.run(m);
  }
  return {out, means};
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(FK_LIBRARY, FK_DISPATCH_KEY, m) { m.impl("depthwise_mlp", TORCH_BOX(&fk::run)); }
