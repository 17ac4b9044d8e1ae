#include "gradients.h"
#include "head_tokens.h"
#include "norm_gradients.h"

namespace fk::heads {
namespace {

// Rows of a task that normalises tokens and sums gradients over them.
constexpr int64_t kBlock = 64;

// The mean of each image's normalised tokens [B, C]: the forward's first step again, its rows left out.
Temporary token_means(const Heads& e, const fk_array& x, const fk_norm& norm) {
  const fk_table& k = kernels();
  fk_head_tokens p = {};
  p.x = x;
  p.norm = norm;
  set_geometry(e, &p);
  const int64_t tasks = e.batch * p.tasks_per_image, padded = padded_channels(e.channels);
  const Tensor sums = empty({tasks, padded}, ScalarType::Float);
  p.sums = static_cast<float*>(const_cast<Tensor&>(sums).mutable_data_ptr());
  run_tasks(tasks, k.scratch_normalize_tokens(&p),
            [&](int64_t task, void* memory) { k.normalize_tokens(&p, task, memory); });
  Temporary means = temporary(e.batch, e.channels, false);
  float* to = static_cast<float*>(means.tensor.mutable_data_ptr());
  run_tasks(e.batch, 0, [&](int64_t image, void*) {
    for (int64_t c = 0; c < e.channels; ++c) {
      double total = 0.0;
      for (int64_t t = 0; t < p.tasks_per_image; ++t) total += p.sums[(image * p.tasks_per_image + t) * padded + c];
      to[image * e.channels + c] = static_cast<float>(total / static_cast<double>(e.tokens));
    }
  });
  return means;
}

void pos_embed_gradient(const Heads& e, const fk_array& grad, Gradients* found) {
  if (!found->wants(kPosEmbed)) return;
  const int64_t own = e.heads * e.channels, image = (e.tokens + e.heads) * e.channels;
  std::vector<double> sums(static_cast<size_t>(own), 0.0);
  for (int64_t i = 0; i < e.batch; ++i)
    for (int64_t c = 0; c < own; ++c) sums[c] += element(grad, (i + 1) * image - own + c);
  found->set(kPosEmbed, sums);
}

std::vector<Tensor> backward(Grads grads, TensorList t, Needs needs, int64_t heads, std::optional<double> norm_eps,
                             double head_norm_eps, ScalarType dtype) {
  const Heads e = check(t, std::nullopt, heads, norm_eps, head_norm_eps, dtype);
  const int64_t width = e.channels / heads, rows = e.batch * heads;
  fk_head_tokens_backward p = {};
  p.x = view(*t[kX], "x");
  p.grad = grad_view(grads, 0, 1, {e.batch, e.tokens + heads, e.channels}, dtype);
  p.batch = e.batch;
  p.tokens = e.tokens;
  p.channels = e.channels;
  p.heads = heads;
  Gradients found(t, needs);
  pos_embed_gradient(e, p.grad, &found);
  const bool passes = found.wants(kX) || found.wants(kNormWeight) || found.wants(kNormBias);
  bool any = passes;
  for (size_t i : {kWeight, kBias, kHeadNormWeight, kHeadNormBias}) any |= found.wants(i);
  if (!any) return found.finish();

  fk_linear linear = {}, to_means = {};
  const Tensor block = pack_once([&](Packer& packer) {
    p.norm = norm_of(packer, e.norm_weight, e.norm_bias, e.norm_eps, e.channels);
    p.head_norm =
        norm_of(packer, FK_LAYER_NORM, e.head_norm_weight, e.head_norm_bias, e.head_norm_eps, e.channels / heads);
    linear = packer.linear(e.weight, e.bias, e.channels, width, e.low_precision);
    to_means = packer.transposed(e.weight, width, e.channels, e.low_precision);
  });
  Memory memory;
  const fk_table& k = kernels();
  const Temporary means = token_means(e, p.x, p.norm);
  const Temporary result = run_linear(means.array, {}, 1, linear, rows, e.channels, width, e.low_precision);
  p.linear_result = result.array;
  p.head_slopes = memory.take<float>(rows * e.channels);
  run_tasks(rows, k.scratch_head_tokens_backward(&p),
            [&](int64_t row, void* scratch) { k.head_tokens_slopes(&p, row, scratch); });
  std::vector<double> weight, bias;
  Temporary slopes = temporary(rows, e.channels, e.low_precision);
  NormGradients out;
  out.x = slopes.tensor.mutable_data_ptr();
  out.weight = &weight;
  out.bias = &bias;
  norm_gradients(result.array, p.head_norm, false, p.head_slopes, width, 1, 1, 0, rows * heads, width, out);
  found.set(kHeadNormWeight, weight);
  found.set(kHeadNormBias, bias);

  fk_linear_backward b = {};
  b.x = means.array;
  b.grad = slopes.array;
  b.to_input = to_means;
  b.low_precision = e.low_precision;
  b.rows = rows;
  b.n = e.channels;
  b.k = width;
  b.inputs = passes ? memory.take<float>(rows * width) : nullptr;
  run_linear_backward(&b, found, {kWeight, kBias});
  if (!passes) return found.finish();
  p.mean_grads = b.inputs;
  p.rows_per_task = kBlock;
  p.tasks_per_image = blocks(e.tokens, kBlock);
  p.dx = found.data(kX);
  p.affine = found.affine_sums(kNormWeight, kNormBias, e.batch * p.tasks_per_image, e.channels);
  run_tasks(e.batch * p.tasks_per_image, k.scratch_head_tokens_backward(&p),
            [&](int64_t task, void* scratch) { k.head_tokens_backward(&p, task, scratch); });
  return found.finish();
}

}  // namespace
}  // namespace fk::heads

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) { m.impl("head_tokens_backward.native", TORCH_BOX(&fk::heads::backward)); }
