#include "conv_gradients.h"
#include "conv_moments.h"
#include "depthwise_conv.h"

namespace fk::depthwise {
namespace {

// The kernels hold a row of the padded map.
constexpr int64_t kMostPadding = 64;

// The convolution as the only branch of a convolutional projection: the others have no results.
void set_geometry(const Convolution& c, const Tensor& x, int64_t stride, int64_t padding, fk_conv_projection* to) {
  to->x = view(x, "x");
  to->batch = c.batch;
  to->height = c.height;
  to->width = c.width;
  to->channels = c.channels;
  for (fk_conv_branch& b : to->branch) b.kernel = b.stride = 1;
  fk_conv_branch& b = to->branch[0];
  b.kernel = c.kernel;
  b.stride = stride;
  b.padding = padding;
  b.out_h = (c.height + 2 * padding - c.kernel) / stride + 1;
  b.out_w = (c.width + 2 * padding - c.kernel) / stride + 1;
  // The patch and the convolved rows of a band stay in the cache.
  const int64_t cached = kCacheBytes / (8 * std::max<int64_t>(1, c.channels * c.width));
  to->rows_per_task = band_rows(c.batch, c.height, cached);
  to->tasks_per_image = blocks(c.height, to->rows_per_task);
}

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
  STD_TORCH_CHECK(padding <= kMostPadding, "padding: expected at most ", kMostPadding);
  fk_conv_projection_backward p = {};
  set_geometry(c, *t[kX], stride, padding, &p.forward);
  const fk_conv_branch& b = p.forward.branch[0];
  const int64_t pixels = b.out_h * b.out_w;
  const fk_array grad = grad_view(grads, 0, 1, {c.batch, pixels, c.channels}, promoted(dtype, t[kResidual]));
  view(t[kResidual], "residual", {c.batch, pixels, c.channels});
  Gradients found(t, needs);
  found.copy(kResidual, grads[0]);
  const bool wants_input = found.wants(kX) || found.wants(kNormWeight) || found.wants(kNormBias);
  bool wants_rest = wants_input || found.wants(kWeight) || found.wants(kBias);
  for (size_t i = kBn; i < kBn + 4; ++i) wants_rest |= found.wants(i);
  if (!wants_rest) return found.finish();

  Memory memory;
  ChannelNorm norm(c.bn, c.channels, padded_channels(c.channels), training, &memory);
  const Tensor block = pack_once([&](Packer& packer) {
    p.forward.norm = norm_of(packer, c.norm_weight, c.norm_bias, c.norm_eps, c.channels);
    const Filter filter =
        packer.depthwise(c.weight, c.bias, BatchNorm{}, c.channels, c.kernel * c.kernel, padded_channels(c.channels));
    p.forward.branch[0].filter = filter.taps;
    p.forward.branch[0].shift = filter.shift;
  });
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
  if (wants_input) map_gradients(&p, kX, kNormWeight, kNormBias, &found);
  return found.finish();
}

}  // namespace
}  // namespace fk::depthwise

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("depthwise_conv_backward.native", TORCH_BOX(&fk::depthwise::backward));
}
