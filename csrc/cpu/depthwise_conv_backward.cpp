#include "conv_gradients.h"
#include "conv_moments.h"
#include "depthwise_conv.h"

namespace fk::depthwise {
namespace {

// Of the convolution's bias: everything that comes through the norm behind it.
void set_bias(const Convolution& c, bool training, const std::vector<double>& alone, Gradients* found) {
  std::vector<double> bias(alone);
  for (size_t i = 0; c.bn.present() && i < bias.size(); ++i)
    bias[i] = training ? 0.0 : bias[i] * c.bn.scale(static_cast<int64_t>(i));
  found->set(kBias, bias);
}

std::vector<Tensor> backward(Grads grads, TensorList t, Needs needs, std::optional<double> norm_eps, double bn_eps,
                             bool training, int64_t height, int64_t width, int64_t stride, int64_t padding,
                             ScalarType dtype) {
  const Convolution c = check(t, std::nullopt, norm_eps, bn_eps, height, width, stride, padding);
  fk_conv_projection_backward p = {};
  set_branch(c, *t[kX], stride, padding, &p.forward);
  const fk_conv_branch& b = p.forward.branch[0];
  const int64_t pixels = b.out_h * b.out_w;
  const fk_array grad = grad_view(grads, 0, 1, {c.batch, pixels, c.channels}, promoted(dtype, t[kResidual]));
  view(t[kResidual], "residual", {c.batch, pixels, c.channels});
  Gradients found(t, needs, true);
  found.copy(kResidual, grads[0]);
  const bool wants_input = found.wants(kX) || found.wants(kNormWeight) || found.wants(kNormBias);
  bool wants_rest = wants_input || found.wants(kWeight) || found.wants(kBias);
  for (size_t i = kBn; i < kBn + 4; ++i) wants_rest |= found.wants(i);
  if (!wants_rest) return found.finish();

  Memory memory;
  ChannelNorm norm(c.bn, c.channels, padded_channels(c.channels), training, &memory);
  const Tensor block = pack_branch(c, &p.forward);
  p.dtype = grad.dtype;
  p.training = training;
  p.branch[0].grad = grad.data;
  p.branch[0].norm = norm.vectors;
  p.branch[0].wants_filter = found.wants(kWeight);
  const ConvSums sums(&p, &memory);
  Tensor map;
  if (wants_input) map = bordered_map(&p, 0);
  if (training && c.bn.present()) {
    // Of the filter's results as they are made here: those given may come from rounded ones.
    const ConvMoments moments = conv_moments(&p.forward);
    for (int64_t i = 0; i < c.channels; ++i) norm.set_statistics(i, moments.mean[0][i], moments.variance[0][i]);
    sums.run(false);
    const std::vector<double> alone = sums.of(0, FK_CONV_GRADS), times = sums.of(0, FK_CONV_GRADS_X);
    batch_norm_gradients(c.bn, true, alone, times, kBn, &found);
    set_bias(c, true, alone, &found);
    norm.set_gradients(alone, times, sums.of(0, FK_CONV_X), static_cast<double>(c.batch * pixels));
  }
  sums.run(true);
  if (!training || !c.bn.present()) {
    const std::vector<double> alone = sums.of(0, FK_CONV_GRADS);
    if (c.bn.present()) batch_norm_gradients(c.bn, false, alone, sums.of(0, FK_CONV_GRADS_X), kBn, &found);
    set_bias(c, false, alone, &found);
  }
  found.set(kWeight, sums.of_filter(0));
  p.own = found.own(kX, grad);
  if (wants_input) map_gradients(&p, kX, kNormWeight, kNormBias, &found);
  return found.finish();
}

}  // namespace
}  // namespace fk::depthwise

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("depthwise_conv_backward.native", TORCH_BOX(&fk::depthwise::backward));
}
