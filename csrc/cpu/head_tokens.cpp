#include "head_tokens.h"

#include <atomic>
#include <vector>

namespace fk::heads {
namespace {

// Rows of a task; fixed, so that the mean does not depend on the number of threads.
constexpr int64_t kRows = 16;

}  // namespace

Heads check(TensorList& t, const std::optional<Tensor>& packed, int64_t heads, std::optional<double> norm_eps,
            double head_norm_eps, ScalarType dtype) {
  check_count(t, kCount);
  const Tensor& x = required(t, kX, "x");
  required(t, kWeight, "weight");
  required(t, kPosEmbed, "pos_embed");
  STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions");
  Heads e;
  e.batch = x.size(0);
  e.tokens = x.size(1);
  e.channels = x.size(2);
  e.heads = heads;
  STD_TORCH_CHECK(e.tokens > 0 && e.channels > 0, "x: expected at least one token and one channel");
  STD_TORCH_CHECK(heads > 0 && e.channels % heads == 0, "num_heads: does not divide the channels");
  const int64_t width = e.channels / heads;
  e.low_precision = kernel_dtype(dtype) == FK_BF16 && kernels().low_precision;
  auto look = [&] {
    e.norm_weight = weight_view(t[kNormWeight], "norm_weight", {e.channels});
    e.norm_bias = weight_view(t[kNormBias], "norm_bias", {e.channels});
    e.weight = weight_view(t[kWeight], "weight", {e.channels, width});
    e.bias = weight_view(t[kBias], "bias", {e.channels});
    e.head_norm_weight = weight_view(t[kHeadNormWeight], "head_norm_weight", {width});
    e.head_norm_bias = weight_view(t[kHeadNormBias], "head_norm_bias", {width});
    e.pos_embed = weight_view(t[kPosEmbed], "pos_embed", {heads, e.channels});
  };
  e.mark = identify({e.channels, heads, e.low_precision, norm_eps.has_value()}, t, kNormWeight, kCount, packed, look);
  e.norm_eps = norm_eps;
  e.head_norm_eps = head_norm_eps;
  return e;
}

void set_geometry(const Heads& e, fk_head_tokens* to) {
  to->batch = e.batch;
  to->tokens = e.tokens;
  to->channels = e.channels;
  to->heads = e.heads;
  to->rows_per_task = kRows;
  to->tasks_per_image = blocks(e.tokens, kRows);
}

namespace {

Tensor prepare(const Heads& e, const std::optional<Tensor>& packed, fk_head_tokens* to) {
  return pack(packed, e.mark, [&](Packer& p) {
    const int64_t width = e.channels / e.heads;
    to->norm = norm_of(p, e.norm_weight, e.norm_bias, e.norm_eps, e.channels);
    to->linear = p.linear(e.weight, e.bias, e.channels, width, e.low_precision);
    to->head_norm = norm_of(p, FK_LAYER_NORM, e.head_norm_weight, e.head_norm_bias, e.head_norm_eps, width);
    to->pos_embed = p.vector(e.pos_embed, e.heads * e.channels, e.heads * e.channels, 0.0f);
  });
}

Tensor run(TensorList t, std::optional<Tensor> packed, int64_t heads, std::optional<double> norm_eps,
           double head_norm_eps, ScalarType dtype) {
  const Heads e = check(t, packed, heads, norm_eps, head_norm_eps, dtype);
  const auto call = std::make_shared<fk_head_tokens>();
  fk_head_tokens& p = *call;
  const Tensor block = prepare(e, packed, &p);
  Tensor out = empty({e.batch, e.tokens + heads, e.channels}, dtype);
  p.x = view(*t[kX], "x");
  p.out = out.mutable_data_ptr();
  p.out_dtype = kernel_dtype(dtype);
  set_geometry(e, &p);
  const int64_t tasks = e.batch * p.tasks_per_image;
  Tensor sums = empty({tasks, padded_channels(e.channels)}, ScalarType::Float);
  p.sums = static_cast<float*>(sums.mutable_data_ptr());
  perform(
      [call, block, sums, tasks] {
        const fk_table& k = kernels();
        const int64_t bytes = std::max(k.scratch_normalize_tokens(call.get()), k.scratch_head_tokens(call.get()));
        // Whoever finishes the last rows of an image makes its head tokens.
        std::vector<std::atomic<int64_t>> finished(static_cast<size_t>(call->batch));
        run_tasks(tasks, bytes, [&](int64_t task, void* memory) {
          k.normalize_tokens(call.get(), task, memory);
          const int64_t image = task / call->tasks_per_image;
          if (finished[static_cast<size_t>(image)].fetch_add(1, std::memory_order_acq_rel) + 1 == call->tasks_per_image)
            k.head_tokens(call.get(), image, memory);
        });
      },
      {&p.x.data, &p.out}, {out});
  return out;
}

Tensor pack_only(TensorList t, int64_t heads, std::optional<double> norm_eps, double head_norm_eps, ScalarType dtype) {
  fk_head_tokens p = {};
  return prepare(check(t, std::nullopt, heads, norm_eps, head_norm_eps, dtype), std::nullopt, &p);
}

}  // namespace
}  // namespace fk::heads

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("head_tokens", TORCH_BOX(&fk::heads::run));
  m.impl("head_tokens_pack", TORCH_BOX(&fk::heads::pack_only));
}
