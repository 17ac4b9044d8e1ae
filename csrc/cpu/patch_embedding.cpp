#include <cstring>

#include "gradients.h"

namespace fk {
namespace {

struct Embedding {
  fk_array weight, bias, norm_weight, norm_bias, in_norm_weight, in_norm_bias;
  BatchNorm bn;
  std::optional<double> norm_eps, in_norm_eps;
  int64_t batch, height, width, channels, kernel, out;
  bool low_precision, bn_after_activation;
  uint64_t mark;
};

struct Weights {
  fk_linear linear;
  Affine affine;
  fk_norm in_norm, norm;
};

// What the operator was called with besides tensors.
struct Options {
  std::optional<double> norm_eps, in_norm_eps;
  int64_t stride, padding;
  std::string activation;
  bool bn_after_activation;
  double bn_eps;
  ScalarType dtype;
};

Embedding check(TensorList& t, const std::optional<Tensor>& packed, const Options& o) {
  check_count(t, 11);
  const Tensor &x = required(t, 0, "x"), &weight = required(t, 1, "weight");
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x, weight: expected 4 dimensions");
  Embedding e;
  e.batch = x.size(0);
  e.height = x.size(1);
  e.width = x.size(2);
  e.channels = x.size(3);
  e.out = weight.size(0);
  e.kernel = weight.size(3);
  e.low_precision = kernel_dtype(o.dtype) == FK_BF16 && kernels().low_precision;
  e.bn_after_activation = o.bn_after_activation;
  int64_t eps_bits;
  __builtin_memcpy(&eps_bits, &o.bn_eps, 8);
  auto look = [&] {
    e.weight = weight_view(t[1], "weight", {e.out, e.channels, e.kernel, e.kernel});
    e.bias = weight_view(t[2], "bias", {e.out});
    e.norm_weight = weight_view(t[3], "norm_weight", {e.out});
    e.norm_bias = weight_view(t[4], "norm_bias", {e.out});
    e.in_norm_weight = weight_view(t[5], "in_norm_weight", {e.channels});
    e.in_norm_bias = weight_view(t[6], "in_norm_bias", {e.channels});
    e.bn = batch_norm(t, 7, e.out, o.bn_eps);
  };
  e.mark = identify({e.out, e.channels, e.kernel, e.low_precision, o.norm_eps.has_value(), o.in_norm_eps.has_value(),
                     o.bn_after_activation, eps_bits},
                    t, 1, 11, packed, look);
  e.norm_eps = o.norm_eps;
  e.in_norm_eps = o.in_norm_eps;
  check_window(e.kernel, o.stride, o.padding, e.height, e.width);
  return e;
}

Tensor prepare(const Embedding& e, const std::optional<Tensor>& packed, Weights* w, bool kept = false) {
  return pack_call(
      packed, e.mark,
      [&](Packer& p) {
        const int64_t taps = e.kernel * e.kernel;
        const int64_t panel = kernels().panel, padded = (e.out + panel - 1) / panel * panel;
        const BatchNorm none = {};
        w->linear = p.folded(e.weight, e.bias, e.out, taps * e.channels, e.low_precision, none,
                             e.bn_after_activation ? none : e.bn, taps);
        // Without its epsilon a norm is only its weight and bias.
        const bool normed = e.norm_eps.has_value();
        w->affine = p.affine(e.bn_after_activation ? e.bn : none, e.out, padded, normed ? absent() : e.norm_weight,
                             normed ? absent() : e.norm_bias);
        const bool in_affine = !e.in_norm_eps.has_value() && (e.in_norm_weight.data || e.in_norm_bias.data);
        w->in_norm = in_affine ? norm_of(p, FK_AFFINE, e.in_norm_weight, e.in_norm_bias, 0.0, e.channels)
                               : norm_of(p, e.in_norm_weight, e.in_norm_bias, e.in_norm_eps, e.channels);
        w->norm = norm_of(p, e.norm_weight, e.norm_bias, e.norm_eps, e.out);
      },
      kept);
}

fk_patch_embedding geometry(const Embedding& e, const TensorList& t, int64_t stride, int64_t padding) {
  fk_patch_embedding p = {};
  p.x = view(*t[0], "x");
  p.activation = FK_NO_ACTIVATION;
  p.batch = e.batch;
  p.height = e.height;
  p.width = e.width;
  p.channels = e.channels;
  p.kernel = e.kernel;
  p.stride = stride;
  p.padding = padding;
  p.out_h = (e.height + 2 * padding - e.kernel) / stride + 1;
  p.out_w = (e.width + 2 * padding - e.kernel) / stride + 1;
  return p;
}

// So few rows, those of a classifier, wait for the weights, which the threads then share.
constexpr int64_t kFewRows = 16, kPanelsOfFewRows = 8;

Tensor run(TensorList t, std::optional<Tensor> packed, std::optional<double> norm_eps,
           std::optional<double> in_norm_eps, int64_t stride, int64_t padding, std::string activation,
           bool bn_after_activation, double bn_eps, bool, ScalarType dtype, ScalarType out_dtype) {
  const Embedding e =
      check(t, packed, {norm_eps, in_norm_eps, stride, padding, activation, bn_after_activation, bn_eps, dtype});
  Weights w;
  const Tensor block = prepare(e, packed, &w);
  const auto call = std::make_shared<fk_patch_embedding>(geometry(e, t, stride, padding));
  fk_patch_embedding& p = *call;
  p.out_dtype = kernel_dtype(out_dtype);
  p.linear = w.linear;
  p.in_norm = w.in_norm;
  p.activation = activation_of(activation);
  p.scale = w.affine.scale;
  p.shift = w.affine.shift;
  p.norm = w.norm;
  Tensor out = empty({e.batch, p.out_h, p.out_w, e.out}, out_dtype);
  p.out = out.mutable_data_ptr();
  const int64_t rows = e.batch * p.out_h * p.out_w;
  const int64_t row_bytes = (e.low_precision ? 2 : 4) * w.linear.k + (e.norm_eps.has_value() ? 4 * e.out : 0);
  const int64_t cached = kCacheBytes / std::max<int64_t>(1, row_bytes);
  p.rows_per_task = rows_per_task(rows, std::min<int64_t>(224, std::max<int64_t>(28, cached)));
  p.panels_per_task = blocks(e.out, kernels().panel);
  if (rows <= kFewRows && !e.norm_eps.has_value()) {
    p.rows_per_task = std::max<int64_t>(1, rows);
    p.panels_per_task = rows_per_task(p.panels_per_task, kPanelsOfFewRows);
  }
  p.panel_groups = blocks(blocks(e.out, kernels().panel), p.panels_per_task);
  const int64_t tasks = blocks(rows, p.rows_per_task) * p.panel_groups;
  perform(
      [call, block, tasks] {
        const fk_table& k = kernels();
        run_tasks(tasks, k.scratch_patch_embedding(call.get()),
                  [&](int64_t task, void* memory) { k.patch_embedding(call.get(), task, memory); });
      },
      {&p.x.data, &p.out}, {out});
  return out;
}

Tensor pack_only(TensorList t, std::optional<double> norm_eps, std::optional<double> in_norm_eps, int64_t stride,
                 int64_t padding, std::string activation, bool bn_after_activation, double bn_eps, bool,
                 ScalarType dtype, ScalarType) {
  Weights w;
  return prepare(
      check(t, std::nullopt, {norm_eps, in_norm_eps, stride, padding, activation, bn_after_activation, bn_eps, dtype}),
      std::nullopt, &w, true);
}

// Rows of a block: their neighbourhoods stay in L2, and each block adds to all of the weight's partial sum.
constexpr int64_t kMostRows = 224, kFewestRows = 112;
constexpr int64_t kBandBytes = 512 * 1024;

// The transposed weight of each tap, and where the gradients of the convolution's results go.
struct InputStep {
  std::vector<fk_linear> taps;
  Tensor weights, slopes;
};

InputStep prepare_input_step(const Embedding& e, fk_patch_embedding_backward* p) {
  const fk_patch_embedding& f = p->forward;
  const int64_t area = e.kernel * e.kernel, value = e.weight.dtype == FK_F32 ? 4 : 2;
  InputStep step;
  step.weights = pack_once([&](Packer& packer) {
    step.taps.clear();
    for (int64_t tap = 0; tap < area; ++tap) {
      const fk_array weight = {static_cast<const char*>(e.weight.data) + tap * value, e.weight.dtype, e.weight.size};
      step.taps.push_back(packer.transposed(weight, e.channels, e.out, e.low_precision, area));
    }
  });
  p->taps = step.taps.data();
  // The first and the last output pixels that a pixel of the map asks for, whether or not they exist.
  p->border_top = p->border_left = (std::max<int64_t>(0, e.kernel - 1 - f.padding) + f.stride - 1) / f.stride;
  p->slope_h = p->border_top + std::max(f.out_h, (e.height - 1 + f.padding) / f.stride + 1);
  p->slope_w = p->border_left + std::max(f.out_w, (e.width - 1 + f.padding) / f.stride + 1);
  p->slope_stride = (e.out + 1) / 2 * 2;
  const int64_t image = p->slope_h * p->slope_w * p->slope_stride * (e.low_precision ? 2 : 4);
  step.slopes = empty({e.batch * image}, ScalarType::Byte);
  char* slopes = static_cast<char*>(step.slopes.mutable_data_ptr());
  run_tasks(e.batch, 0, [&](int64_t i, void*) { std::memset(slopes + i * image, 0, static_cast<size_t>(image)); });
  p->slopes = slopes;
  const int64_t panel = kernels().panel, columns = blocks(e.channels, panel) * panel;
  const int64_t row = 4 * e.width * columns;
  p->rows_per_band = std::max<int64_t>(1, std::min(e.height, kBandBytes / std::max<int64_t>(1, row)));
  p->bands = blocks(e.height, p->rows_per_band);
  return step;
}

std::vector<Tensor> backward(Grads grads, TensorList t, Needs needs, std::optional<double> norm_eps,
                             std::optional<double> in_norm_eps, int64_t stride, int64_t padding, std::string activation,
                             bool bn_after_activation, double bn_eps, bool, ScalarType dtype, ScalarType out_dtype) {
  const Embedding e =
      check(t, std::nullopt, {norm_eps, in_norm_eps, stride, padding, activation, bn_after_activation, bn_eps, dtype});
  STD_TORCH_CHECK(activation == "none" && !e.bn.present(), "activation, bn: have no gradients here");
  STD_TORCH_CHECK((norm_eps.has_value() || (!e.norm_weight.data && !e.norm_bias.data)) &&
                      (in_norm_eps.has_value() || (!e.in_norm_weight.data && !e.in_norm_bias.data)),
                  "norm_eps, in_norm_eps: a norm without one has no gradients here");
  fk_patch_embedding_backward p = {};
  p.forward = geometry(e, t, stride, padding);
  fk_patch_embedding& f = p.forward;
  p.grad = grad_view(grads, 0, 1, {e.batch, f.out_h, f.out_w, e.out}, out_dtype);
  p.low_precision = e.low_precision;
  const Tensor block = pack_once([&](Packer& packer) {
    const int64_t taps = e.kernel * e.kernel, k = taps * e.channels;
    f.linear = {nullptr, nullptr, e.out, k, e.low_precision, nullptr};
    if (e.norm_eps.has_value()) f.linear = packer.linear(e.weight, e.bias, e.out, k, e.low_precision, taps);
    f.in_norm = norm_of(packer, e.in_norm_weight, e.in_norm_bias, e.in_norm_eps, e.channels);
    f.norm = norm_of(packer, e.norm_weight, e.norm_bias, e.norm_eps, e.out);
  });

  Gradients found(t, needs);
  const int64_t rows = e.batch * f.out_h * f.out_w;
  const int64_t cached = 2 * kCacheBytes / (4 * std::max<int64_t>(1, f.linear.k + e.out));
  p.rows_per_block = std::max<int64_t>(1, std::min({rows, kMostRows, std::max(kFewestRows, cached)}));
  p.partials = partial_count(blocks(rows, p.rows_per_block), 4 * e.out * f.linear.k);
  p.weight = found.sums(1, p.partials, e.out, f.linear.k, e.kernel * e.kernel);
  p.bias = found.sums(2, p.partials, 1, e.out);
  p.affine = found.affine_sums(3, 4, p.partials, e.out);
  p.dx = found.data(0);
  InputStep input;
  const bool wants_input = (p.dx || found.wants(5) || found.wants(6)) && e.batch > 0 && e.channels > 0;
  if (wants_input) input = prepare_input_step(e, &p);
  p.in_affine = found.affine_sums(5, 6, wants_input ? e.batch * p.bands : 0, e.channels);
  const fk_table& k = kernels();
  run_tasks(p.partials, k.scratch_patch_embedding_backward(&p),
            [&](int64_t task, void* memory) { k.patch_embedding_backward(&p, task, memory); });
  if (wants_input)
    run_tasks(e.batch * p.bands, k.scratch_patch_embedding_input(&p),
              [&](int64_t task, void* memory) { k.patch_embedding_input(&p, task, memory); });
  return found.finish();
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("patch_embedding", TORCH_BOX(&fk::run));
  m.impl("patch_embedding_pack", TORCH_BOX(&fk::pack_only));
  m.impl("patch_embedding_backward.native", TORCH_BOX(&fk::backward));
}
