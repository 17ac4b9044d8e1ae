#include "conv_projection.h"

#include <tuple>

#include "conv_moments.h"

namespace fk::projection {
namespace {

constexpr int64_t kMostPadding = 64;
const char* const kFields[kPerBranch] = {"conv_weight", "bn_weight", "bn_bias", "bn_mean", "bn_var", "weight", "bias"};

}  // namespace

Projection check(TensorList& t, const std::optional<Tensor>& packed, const Options& o) {
  check_count(t, kFirstBranch + kBranches * kPerBranch);
  STD_TORCH_CHECK(o.bn_eps.size() == kBranches && o.stride.size() == kBranches && o.padding.size() == kBranches,
                  "bn_eps, stride, padding: expected one entry per branch");
  const Tensor& x = required(t, 0, "x");
  STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions");
  Projection p;
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.channels = x.size(2);
  check_grid(p.tokens, o.prefix, o.height, o.width);
  p.norm_eps = o.norm_eps;
  p.low_precision = kernel_dtype(o.dtype) == FK_BF16 && kernels().low_precision;
  int64_t eps_bits[4] = {};
  for (int i = 0; i < kBranches; ++i) __builtin_memcpy(&eps_bits[i], &o.bn_eps[i], 8);
  auto look = [&] {
    p.norm_weight = weight_view(t[1], "norm_weight", {p.channels});
    p.norm_bias = weight_view(t[2], "norm_bias", {p.channels});
    for (int i = 0; i < kBranches; ++i) {
      const size_t first = kFirstBranch + i * kPerBranch;
      Branch& b = p.branch[i];
      const Tensor &conv = required(t, first, kFields[0]), &weight = required(t, first + 5, kFields[5]);
      STD_TORCH_CHECK(conv.dim() == 4 && weight.dim() == 2, "conv_weight, weight: unexpected rank");
      b.kernel = conv.size(3);
      b.out = weight.size(0);
      b.filter = weight_view(t[first], kFields[0], {p.channels, 1, b.kernel, b.kernel});
      // Without its statistics weight and bias of the batch norm wait for those of the batch, which are computed here.
      fk_array bn[4];
      for (int f = 0; f < 4; ++f) bn[f] = weight_view(t[first + 1 + f], kFields[1 + f], {p.channels});
      STD_TORCH_CHECK(!bn[2].data == !bn[3].data, "bn_mean, bn_var: expected both or none");
      b.bn = {bn[0], bn[1], bn[2], bn[3], o.bn_eps[i]};
      b.weight = weight_view(t[first + 5], kFields[5], {b.out, p.channels});
      b.bias = weight_view(t[first + 6], kFields[6], {b.out});
      // The patch in scratch grows with the padding.
      check_window(b.kernel, o.stride[i], o.padding[i], o.height, o.width, kMostPadding);
    }
  };
  p.mark = identify({p.channels, p.low_precision, o.norm_eps.has_value(), eps_bits[0], eps_bits[1], eps_bits[2]}, t, 1,
                    t.size(), packed, look);
  return p;
}

void set_geometry(const Projection& p, const Options& o, const Tensor& x, fk_conv_projection* to) {
  to->x = view(x, "x");
  to->batch = p.batch;
  to->height = o.height;
  to->width = o.width;
  to->channels = p.channels;
  to->prefix = o.prefix;
  for (int i = 0; i < kBranches; ++i) {
    fk_conv_branch& b = to->branch[i];
    b.kernel = p.branch[i].kernel;
    b.stride = o.stride[i];
    b.padding = o.padding[i];
    b.out_h = (o.height + 2 * b.padding - b.kernel) / b.stride + 1;
    b.out_w = (o.width + 2 * b.padding - b.kernel) / b.stride + 1;
  }
}

// A band reads its halo again: as high as the cache allows.
int64_t cached_rows(const Projection& p, int64_t width) {
  return std::max<int64_t>(1, kCacheBytes / (8 * std::max<int64_t>(1, p.channels * width)));
}

void describe_filter(Packer& packer, const Projection& p, int branch, bool normalized, fk_conv_branch* to) {
  const Branch& b = p.branch[branch];
  const Filter filter = packer.depthwise(b.filter, absent(), normalized ? b.bn : BatchNorm{}, p.channels,
                                         b.kernel * b.kernel, padded_channels(p.channels));
  to->filter = filter.taps;
  to->shift = filter.shift;
}

namespace {

// `reduces`: results are summed over bands, which must then not depend on the number of threads.
void set_bands(const Projection& p, bool reduces, fk_conv_projection* to) {
  const int64_t cached = cached_rows(p, to->width);
  to->rows_per_task =
      reduces ? std::min(cached, blocks(to->height, 4)) : rows_per_image_task(p.batch, to->height, cached);
  to->tasks_per_image = blocks(to->height, to->rows_per_task);
}

Tensor prepare(const Projection& p, const std::optional<Tensor>& packed, fk_conv_projection* to, bool kept = false) {
  return pack_call(
      packed, p.mark,
      [&](Packer& packer) {
        to->norm = norm_of(packer, p.norm_weight, p.norm_bias, p.norm_eps, p.channels);
        for (int i = 0; i < kBranches; ++i) {
          const Branch& b = p.branch[i];
          describe_filter(packer, p, i, true, &to->branch[i]);
          to->branch[i].linear = packer.linear(b.weight, b.bias, b.out, p.channels, p.low_precision);
        }
      },
      kept);
}

std::tuple<Tensor, Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::optional<double> norm_eps,
                                       std::vector<double> bn_eps, bool, int64_t height, int64_t width, int64_t prefix,
                                       std::vector<int64_t> stride, std::vector<int64_t> padding, ScalarType dtype) {
  const Options o = {norm_eps, bn_eps, height, width, prefix, stride, padding, dtype};
  const Projection p = check(t, packed, o);
  const auto call = std::make_shared<fk_conv_projection>();
  fk_conv_projection& c = *call;
  const Tensor block = prepare(p, packed, &c);
  set_geometry(p, o, *t[0], &c);
  set_bands(p, false, &c);
  c.out_dtype = kernel_dtype(dtype);
  Tensor out[kBranches];
  for (int i = 0; i < kBranches; ++i) {
    fk_conv_branch& b = c.branch[i];
    out[i] = empty({p.batch, prefix + b.out_h * b.out_w, p.branch[i].out}, dtype);
    b.out = out[i].mutable_data_ptr();
  }
  perform(
      [call, block] {
        const fk_table& k = kernels();
        run_tasks(call->batch * call->tasks_per_image, k.scratch_conv_projection(call.get()),
                  [&](int64_t task, void* memory) { k.conv_projection(call.get(), task, memory); });
      },
      {&c.x.data, &c.branch[0].out, &c.branch[1].out, &c.branch[2].out}, {out[0], out[1], out[2]});
  return {out[0], out[1], out[2]};
}

// Mean and biased variance [3, 2, C] of the depthwise outputs.
Tensor statistics(TensorList t, std::optional<double> norm_eps, std::vector<double> bn_eps, bool, int64_t height,
                  int64_t width, int64_t prefix, std::vector<int64_t> stride, std::vector<int64_t> padding,
                  ScalarType dtype) {
  const Options o = {norm_eps, bn_eps, height, width, prefix, stride, padding, dtype};
  const Projection p = check(t, std::nullopt, o);
  fk_conv_projection c = {};
  auto describe = [&](Packer& packer) {
    c.norm = norm_of(packer, p.norm_weight, p.norm_bias, p.norm_eps, p.channels);
    for (int i = 0; i < kBranches; ++i) describe_filter(packer, p, i, false, &c.branch[i]);
  };
  const Tensor block = pack(std::nullopt, p.mark, describe);
  set_geometry(p, o, *t[0], &c);
  set_bands(p, true, &c);
  const ConvMoments moments = conv_moments(&c);
  Tensor out = empty({kBranches, 2, p.channels}, ScalarType::Float);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  for (int i = 0; i < kBranches; ++i)
    for (int64_t ch = 0; ch < p.channels; ++ch) {
      to[2 * i * p.channels + ch] = static_cast<float>(moments.mean[i][ch]);
      to[(2 * i + 1) * p.channels + ch] = static_cast<float>(moments.variance[i][ch]);
    }
  return out;
}

Tensor pack_only(TensorList t, std::optional<double> norm_eps, std::vector<double> bn_eps, bool, int64_t height,
                 int64_t width, int64_t prefix, std::vector<int64_t> stride, std::vector<int64_t> padding,
                 ScalarType dtype) {
  fk_conv_projection c = {};
  return prepare(check(t, std::nullopt, {norm_eps, bn_eps, height, width, prefix, stride, padding, dtype}),
                 std::nullopt, &c, true);
}

}  // namespace
}  // namespace fk::projection

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("conv_projection", TORCH_BOX(&fk::projection::run));
  m.impl("conv_projection_pack", TORCH_BOX(&fk::projection::pack_only));
  m.impl("conv_projection_statistics", TORCH_BOX(&fk::projection::statistics));
}
