#include "conv_gradients.h"
#include "conv_moments.h"
#include "depthwise_conv.h"

namespace fk::depthwise {
namespace {

// The kernels hold a row of the padded map.
constexpr int64_t kMostPadding = 64;

}  // namespace

void set_branch(const Convolution& c, const Tensor& x, int64_t stride, int64_t padding, fk_conv_projection* to) {
  STD_TORCH_CHECK(padding <= kMostPadding, "padding: expected at most ", kMostPadding);
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

Tensor pack_branch(const Convolution& c, fk_conv_projection* to) {
  return pack_once([&](Packer& packer) {
    to->norm = norm_of(packer, c.norm_weight, c.norm_bias, c.norm_eps, c.channels);
    const Filter filter =
        packer.depthwise(c.weight, c.bias, BatchNorm{}, c.channels, c.kernel * c.kernel, padded_channels(c.channels));
    to->branch[0].filter = filter.taps;
    to->branch[0].shift = filter.shift;
  });
}

namespace {

// Mean and biased variance [2, C] of the convolution's results.
Tensor statistics(TensorList t, std::optional<double> norm_eps, double bn_eps, bool, int64_t height, int64_t width,
                  int64_t stride, int64_t padding, ScalarType) {
  const Convolution c = check(t, std::nullopt, norm_eps, bn_eps, height, width, stride, padding);
  fk_conv_projection p = {};
  set_branch(c, *t[kX], stride, padding, &p);
  const Tensor block = pack_branch(c, &p);
  const ConvMoments moments = conv_moments(&p);
  Tensor out = empty({2, c.channels}, ScalarType::Float);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < c.channels; ++i) {
    to[i] = static_cast<float>(moments.mean[0][i]);
    to[c.channels + i] = static_cast<float>(moments.variance[0][i]);
  }
  return out;
}

}  // namespace
}  // namespace fk::depthwise

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("depthwise_conv_statistics", TORCH_BOX(&fk::depthwise::statistics));
}
