#include "gradients.h"
#include "pooled_projection.h"
#include "statistics_gradients.h"

namespace fk::pooled {
namespace {

std::vector<Tensor> backward(Grads grads, TensorList t, Needs needs, std::optional<double> in_norm_eps,
                             std::optional<double> norm_eps, int64_t height, int64_t width, int64_t kernel,
                             bool ceil_mode, ScalarType dtype) {
  const Projection e = check(t, std::nullopt, in_norm_eps, norm_eps, height, width, kernel, ceil_mode, dtype);
  STD_TORCH_CHECK(!t[kStatistics].has_value() || in_norm_eps.has_value(), "in_norm_statistics: there is no such norm");
  fk_pooled_projection p = {};
  fk_linear to_input = {};
  set_geometry(e, *t[kX], height, width, kernel, ceil_mode, &p);
  const int64_t all = p.pooled_h * p.pooled_w, rows = e.batch * all, n = e.channels;
  const fk_array grad = grad_view(grads, 0, 1, {e.batch, all, e.out}, dtype);
  const Tensor block = prepare(e, std::nullopt, &p);
  const Tensor back =
      pack_once([&](Packer& packer) { to_input = packer.transposed(e.weight, n, e.out, e.low_precision); });
  Gradients found(t, needs);
  Memory memory;

  // Pooled pixels in front of either norm and behind both.
  const fk_norm in_norm = p.in_norm;
  p.in_norm.kind = FK_NO_NORM;
  const Tensor raw = pool(&p, false, nullptr);
  fk_norm norms[2] = {in_norm, p.norm};
  std::vector<float> groups[2];
  fk_array maps[3] = {view(raw, "pooled")};
  Tensor held[2];
  set_group_statistics(&norms[0], group_statistics(norms[0], t[kStatistics], e.batch), p.x, e.batch, 0, height * width,
                       n, &groups[0]);
  for (int i = 0; i < 2; ++i) {
    maps[i + 1] = maps[i];
    if (norms[i].kind == FK_NO_NORM) continue;
    if (i == 1) set_group_statistics(&norms[1], nullptr, maps[1], e.batch, 0, all, n, &groups[1]);
    const Temporary normed = run_linear(maps[i], norms[i], all, {}, rows, n, n, false);
    held[i] = normed.tensor;
    maps[i + 1] = normed.array;
  }

  const bool passes = found.wants(kX) || found.wants(kInNormWeight) || found.wants(kInNormBias) ||
                      found.wants(kStatistics) || found.wants(kNormWeight) || found.wants(kNormBias);
  fk_linear_backward b = {};
  b.x = maps[2];
  b.grad = grad;
  b.to_input = to_input;
  b.low_precision = e.low_precision;
  b.rows = rows;
  b.n = e.out;
  b.k = n;
  b.inputs = passes ? memory.take<float>(rows * n) : nullptr;
  run_linear_backward(&b, found, {kWeight, kBias});
  if (!passes) return found.finish();
  // Backwards through both norms.
  const float* slopes = b.inputs;
  auto through = [&](int i, size_t weight_at, size_t bias_at, float* of_statistics) {
    if (norms[i].kind == FK_NO_NORM) return;
    NormGradients out;
    float* inputs = memory.take<float>(rows * n);
    std::vector<double> weight, bias;
    out.x = inputs;
    out.weight = &weight;
    out.bias = &bias;
    out.statistics = of_statistics;
    norm_gradients(maps[i], norms[i], of_statistics != nullptr, slopes, n, 1, e.batch, 0, all, n, out);
    found.set(weight_at, weight);
    found.set(bias_at, bias);
    slopes = inputs;
  };
  through(1, kNormWeight, kNormBias, nullptr);
  std::vector<float> of_statistics(static_cast<size_t>(2 * e.batch), 0.0f);
  through(0, kInNormWeight, kInNormBias, of_statistics.data());
  if (norms[0].kind != FK_NO_NORM)
    found.set(kStatistics, std::vector<double>(of_statistics.begin(), of_statistics.end()));
  if (!found.wants(kX)) return found.finish();
  fk_pool_backward s = {};
  s.forward = p;
  s.slopes = slopes;
  s.dx = found.data(kX);
  if (norms[0].kind != FK_NO_NORM && !t[kStatistics].has_value()) {
    s.groups = norms[0].groups;
    s.of_statistics = of_statistics.data();
  }
  const fk_table& k = kernels();
  run_tasks(e.batch * height, 0, [&](int64_t row, void*) { k.pool_backward(&s, row); });
  return found.finish();
}

}  // namespace
}  // namespace fk::pooled

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("pooled_projection_backward.native", TORCH_BOX(&fk::pooled::backward));
}
