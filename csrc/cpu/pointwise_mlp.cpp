#include "gradients.h"

namespace fk {
namespace {

struct Weights {
  fk_norm norm;
  fk_linear expand, project;
};

struct Mlp {
  fk_array norm_weight, norm_bias, weight1, bias1, weight2, bias2;
  int64_t channels, hidden, out;
  std::optional<double> norm_eps;
  bool low_precision;
  uint64_t mark;
};

Mlp check(TensorList& t, const std::optional<Tensor>& packed, std::optional<double> norm_eps, ScalarType dtype) {
  check_count(t, 8);
  const Tensor &x = required(t, 0, "x"), &w1 = required(t, 3, "weight1"), &w2 = required(t, 5, "weight2");
  STD_TORCH_CHECK(x.dim() >= 1 && w1.dim() == 2 && w2.dim() == 2, "x, weight1, weight2: unexpected rank");
  Mlp m;
  m.channels = x.size(x.dim() - 1);
  m.hidden = w1.size(0);
  m.out = w2.size(0);
  m.low_precision = kernel_dtype(dtype) == FK_BF16 && kernels().low_precision;
  auto look = [&] {
    m.norm_weight = weight_view(t[1], "norm_weight", {m.channels});
    m.norm_bias = weight_view(t[2], "norm_bias", {m.channels});
    m.weight1 = weight_view(t[3], "weight1", {m.hidden, m.channels});
    m.bias1 = weight_view(t[4], "bias1", {m.hidden});
    m.weight2 = weight_view(t[5], "weight2", {m.out, m.hidden});
    m.bias2 = weight_view(t[6], "bias2", {m.out});
  };
  m.mark = identify({m.channels, m.hidden, m.out, m.low_precision, norm_eps.has_value()}, t, 1, 7, packed, look);
  m.norm_eps = norm_eps;
  return m;
}

Tensor prepare(const Mlp& m, const std::optional<Tensor>& packed, Weights* w, bool kept = false) {
  return pack_call(
      packed, m.mark,
      [&](Packer& p) {
        w->norm = norm_of(p, m.norm_weight, m.norm_bias, m.norm_eps, m.channels);
        w->expand = p.linear(m.weight1, m.bias1, m.hidden, m.channels, m.low_precision);
        w->project = p.linear(m.weight2, m.bias2, m.out, m.hidden, m.low_precision);
      },
      kept);
}

fk_activation activation_of(const std::string& name) {
  STD_TORCH_CHECK(name == "gelu" || name == "quick_gelu", "activation: unknown name");
  return name == "gelu" ? FK_GELU : FK_QUICK_GELU;
}

Tensor run(TensorList t, std::optional<Tensor> packed, std::optional<double> norm_eps, std::string activation,
           ScalarType dtype) {
  const Mlp m = check(t, packed, norm_eps, dtype);
  Weights w;
  const Tensor block = prepare(m, packed, &w);
  const Tensor& x = *t[0];
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = m.out;
  const ScalarType out_dtype = promoted(dtype, t[7]);
  Tensor out = empty(shape, out_dtype);
  if (t[7].has_value()) check_same_shape(*t[7], out, "residual");

  const auto call = std::make_shared<fk_pointwise_mlp>();
  fk_pointwise_mlp& p = *call;
  p.x = view(x, "x");
  p.residual = t[7].has_value() ? view(*t[7], "residual") : absent();
  p.out = out.mutable_data_ptr();
  p.out_dtype = kernel_dtype(out_dtype);
  p.norm = w.norm;
  p.expand = w.expand;
  p.project = w.project;
  p.activation = activation_of(activation);
  p.channels = m.channels;
  p.rows = m.out ? out.numel() / m.out : 0;
  // Normalised rows and running sums of a block stay in a part of L2.
  const int64_t cached = kCacheBytes / (8 * std::max<int64_t>(1, std::max(m.channels, m.out)));
  p.rows_per_task = rows_per_task(p.rows, std::min<int64_t>(224, std::max<int64_t>(28, cached)));
  perform(
      [call, block] {
        const fk_table& k = kernels();
        run_tasks(blocks(call->rows, call->rows_per_task), k.scratch_pointwise_mlp(call.get()),
                  [&](int64_t task, void* memory) { k.pointwise_mlp(call.get(), task, memory); });
      },
      {&p.x.data, &p.residual.data, &p.out}, {out});
  return out;
}

Tensor pack_only(TensorList t, std::optional<double> norm_eps, std::string, ScalarType dtype) {
  Weights w;
  return prepare(check(t, std::nullopt, norm_eps, dtype), std::nullopt, &w, true);
}

// A chunk of hidden channels: what the rows of a block need of it stays in the cache.
constexpr int64_t kChunk = 256;
// Rows of a block: each adds to all of both weights' partial sums, which come from beyond L2.
constexpr int64_t kMostRows = 224, kFewestRows = 56;

std::vector<Tensor> backward(Grads grads, TensorList t, Needs needs, std::optional<double> norm_eps,
                             std::string activation, ScalarType dtype) {
  const Mlp m = check(t, std::nullopt, norm_eps, dtype);
  const Tensor& x = *t[0];
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = m.out;
  fk_pointwise_mlp_backward p = {};
  p.x = view(x, "x");
  p.grad = grad_view(grads, 0, 1, shape, promoted(dtype, t[7]));
  if (t[7].has_value()) {
    view(*t[7], "residual");
    check_same_shape(*t[7], grads[0], "residual");
  }
  p.activation = activation_of(activation);
  p.rows = m.out ? grads[0].numel() / m.out : 0;
  p.channels = m.channels;
  p.hidden = m.hidden;
  p.out = m.out;
  const Tensor block = pack_once([&](Packer& packer) {
    p.norm = norm_of(packer, m.norm_weight, m.norm_bias, m.norm_eps, m.channels);
    p.expand = packer.linear(m.weight1, m.bias1, m.hidden, m.channels, m.low_precision);
    p.to_hidden = packer.transposed(m.weight2, m.hidden, m.out, m.low_precision);
    p.to_input = packer.transposed(m.weight1, m.channels, m.hidden, m.low_precision);
  });

  Gradients found(t, needs, true);
  const int64_t cached = 2 * kCacheBytes / (8 * std::max<int64_t>(1, std::max(m.channels, m.out)));
  p.rows_per_block = std::max<int64_t>(1, std::min({p.rows, kMostRows, std::max(kFewestRows, cached)}));
  const int64_t weights = 4 * m.hidden * (m.channels + m.out), blocks_of_rows = blocks(p.rows, p.rows_per_block);
  p.partials = partial_count(blocks_of_rows, weights);
  // Few partial sums are shared by several tasks, each with its hidden channels.
  const int64_t panel = kernels().panel, panels = blocks(m.hidden, panel);
  p.slice_panels =
      p.partials > 0 ? blocks(panels, std::min(blocks(panels * panel, kChunk), kPartials / p.partials)) : 1;
  p.slices = blocks(panels, p.slice_panels);
  p.chunk_panels = blocks(p.slice_panels, blocks(p.slice_panels * panel, kChunk));
  p.weight1 = found.sums(3, p.partials, m.hidden, m.channels);
  p.bias1 = found.sums(4, p.partials, 1, m.hidden);
  p.weight2 = found.sums(5, p.partials, m.out, m.hidden);
  p.bias2 = found.sums(6, p.partials, 1, m.out);
  p.affine = found.affine_sums(1, 2, p.partials, m.channels);
  p.dx = found.data(0);
  p.own = found.own(0, p.grad);
  p.wants_input = p.dx || p.affine;
  if (p.wants_input && p.slices > 1) p.inputs = found.memory(p.slices * p.rows * m.channels);
  const fk_table& k = kernels();
  const int64_t scratch_bytes = k.scratch_pointwise_mlp_backward(&p);
  run_tasks(p.partials * p.slices, scratch_bytes,
            [&](int64_t task, void* memory) { k.pointwise_mlp_backward(&p, task, memory); });
  if (p.inputs)
    run_tasks(p.partials, scratch_bytes,
              [&](int64_t task, void* memory) { k.pointwise_mlp_backward_input(&p, task, memory); });
  found.copy(7, grads[0]);
  return found.finish();
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("pointwise_mlp", TORCH_BOX(&fk::run));
  m.impl("pointwise_mlp_pack", TORCH_BOX(&fk::pack_only));
  m.impl("pointwise_mlp_backward.native", TORCH_BOX(&fk::backward));
}
