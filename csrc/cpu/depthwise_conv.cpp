#include "depthwise_conv.h"

namespace fk::depthwise {

Convolution check(TensorList& t, const std::optional<Tensor>& packed, std::optional<double> norm_eps, double bn_eps,
                  int64_t height, int64_t width, int64_t stride, int64_t padding) {
  check_count(t, kCount);
  const Tensor &x = required(t, kX, "x"), &weight = required(t, kWeight, "weight");
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 4, "x, weight: unexpected rank");
  Convolution c;
  c.batch = x.size(0);
  c.height = height;
  c.width = width;
  c.channels = x.size(2);
  c.kernel = weight.size(3);
  c.norm_eps = norm_eps;
  check_grid(x.size(1), 0, height, width);
  check_window(c.kernel, stride, padding, height, width);
  int64_t eps_bits;
  __builtin_memcpy(&eps_bits, &bn_eps, 8);
  auto look = [&] {
    c.weight = weight_view(t[kWeight], "weight", {c.channels, 1, c.kernel, c.kernel});
    c.bias = weight_view(t[kBias], "bias", {c.channels});
    c.norm_weight = weight_view(t[kNormWeight], "norm_weight", {c.channels});
    c.norm_bias = weight_view(t[kNormBias], "norm_bias", {c.channels});
    c.bn = batch_norm(t, kBn, c.channels, bn_eps);
  };
  c.mark = identify({c.channels, c.kernel, norm_eps.has_value(), eps_bits}, t, kWeight, kResidual, packed, look);
  return c;
}

namespace {

Tensor prepare(const Convolution& c, const std::optional<Tensor>& packed, fk_depthwise_conv* to) {
  return pack(packed, c.mark, [&](Packer& p) {
    to->norm = norm_of(p, c.norm_weight, c.norm_bias, c.norm_eps, c.channels);
    const Filter filter =
        p.depthwise(c.weight, c.bias, c.bn, c.channels, c.kernel * c.kernel, padded_channels(c.channels));
    to->filter = filter.taps;
    to->shift = filter.shift;
  });
}

// Tiles are bands of rows, as high as the cache allows, yet enough for all threads: of a map with few rows halves of
// them. A norm in front is computed again where tiles read the same pixels; its bands stay whole.
void choose_tiles(fk_depthwise_conv* p) {
  const int64_t line = std::max<int64_t>(1, p->stride * p->width * p->channels * 4);
  const int64_t most = std::max<int64_t>(1, kCacheBytes / line);
  p->rows_per_task = rows_per_image_task(p->batch, p->out_h, most);
  p->columns_per_task = p->out_w;
  const bool overlap = p->norm.kind != FK_NO_NORM && p->kernel > p->stride;
  if (!overlap && p->batch * p->out_h < 8 * torch::stable::get_num_threads()) {
    p->rows_per_task = 1;
    p->columns_per_task = (p->out_w + 1) / 2;
  }
}

Tensor run(TensorList t, std::optional<Tensor> packed, std::optional<double> norm_eps, double bn_eps, bool,
           int64_t height, int64_t width, int64_t stride, int64_t padding, ScalarType dtype) {
  const Convolution c = check(t, packed, norm_eps, bn_eps, height, width, stride, padding);
  const auto call = std::make_shared<fk_depthwise_conv>();
  fk_depthwise_conv& p = *call;
  const Tensor block = prepare(c, packed, &p);
  p.x = view(*t[kX], "x");
  p.batch = c.batch;
  p.height = height;
  p.width = width;
  p.channels = c.channels;
  p.kernel = c.kernel;
  p.stride = stride;
  p.padding = padding;
  p.out_h = (height + 2 * padding - c.kernel) / stride + 1;
  p.out_w = (width + 2 * padding - c.kernel) / stride + 1;
  const ScalarType out_dtype = promoted(dtype, t[kResidual]);
  Tensor out = empty({c.batch, p.out_h * p.out_w, c.channels}, out_dtype);
  p.residual = view(t[kResidual], "residual", {c.batch, p.out_h * p.out_w, c.channels});
  p.out = out.mutable_data_ptr();
  p.out_dtype = kernel_dtype(out_dtype);
  choose_tiles(&p);
  const int64_t tasks = c.batch * blocks(p.out_h, p.rows_per_task) * blocks(p.out_w, p.columns_per_task);
  perform(
      [call, block, tasks] {
        const fk_table& k = kernels();
        run_tasks(tasks, k.scratch_depthwise_conv(call.get()),
                  [&](int64_t task, void* memory) { k.depthwise_conv(call.get(), task, memory); });
      },
      {&p.x.data, &p.residual.data, &p.out}, {out});
  return out;
}

Tensor pack_only(TensorList t, std::optional<double> norm_eps, double bn_eps, bool, int64_t height, int64_t width,
                 int64_t stride, int64_t padding, ScalarType) {
  fk_depthwise_conv p = {};
  return prepare(check(t, std::nullopt, norm_eps, bn_eps, height, width, stride, padding), std::nullopt, &p);
}

}  // namespace
}  // namespace fk::depthwise

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("depthwise_conv", TORCH_BOX(&fk::depthwise::run));
  m.impl("depthwise_conv_pack", TORCH_BOX(&fk::depthwise::pack_only));
}
