#include "plan.h"

namespace fk {
namespace {

enum Index { kX, kMean, kNormWeight, kNormBias, kWeight1, kBias1, kWeight2, kBias2, kCount };

void run(Tensor out, TensorList t, std::optional<double> norm_eps, std::string activation) {
  check_count(t, kCount);
  const Tensor &x = required(t, kX, "x"), &mean = required(t, kMean, "mean");
  const Tensor& weight1 = required(t, kWeight1, "weight1");
  required(t, kWeight2, "weight2");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0, "x: expected [B, N, C] with a token");
  STD_TORCH_CHECK(weight1.dim() == 2, "weight1: expected 2 dimensions");
  const auto call = std::make_shared<fk_class_token>();
  fk_class_token& p = *call;
  const int64_t batch = x.size(0);
  p.rows = x.size(1);
  p.channels = x.size(2);
  p.hidden = weight1.size(0);
  STD_TORCH_CHECK(p.channels > 0 && p.hidden > 0, "weights: expected at least one channel");
  check_same_shape(out, x, "out");
  check_shape(mean, "mean", {batch, p.channels});
  p.x = view(x, "x");
  p.mean = view(mean, "mean");
  p.norm_weight = view(t[kNormWeight], "norm_weight", {p.channels});
  p.norm_bias = view(t[kNormBias], "norm_bias", {p.channels});
  p.weight1 = view(t[kWeight1], "weight1", {p.hidden, p.channels});
  p.bias1 = view(t[kBias1], "bias1", {p.hidden});
  p.weight2 = view(t[kWeight2], "weight2", {p.channels, p.hidden});
  p.bias2 = view(t[kBias2], "bias2", {p.channels});
  p.activation = activation_of(activation);
  p.out = view(out, "out");
  p.eps = static_cast<float>(norm_eps.value_or(0.0));
  p.normed = norm_eps.has_value();
  if (recording()) {
    std::vector<Tensor> weights;
    for (size_t i = kNormWeight; i < kCount; ++i)
      if (t[i].has_value()) weights.push_back(*t[i]);
    record_weights(weights, {});
  }
  perform(
      [call, batch] {
        const fk_table& k = kernels();
        run_tasks(batch, k.scratch_gate_class_token(call.get()),
                  [&](int64_t image, void* memory) { k.gate_class_token(call.get(), image, memory); });
      },
      {&p.x.data, &p.mean.data, &p.out.data}, {});
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) { m.impl("gate_class_token", TORCH_BOX(&fk::run)); }
