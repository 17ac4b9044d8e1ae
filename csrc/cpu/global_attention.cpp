#include "global_attention.h"

namespace fk::global {

Attention check(TensorList& t, const std::optional<Tensor>& packed, int64_t heads, const std::string& norm,
                double norm_eps, bool add_query_input, ScalarType dtype) {
  check_count(t, kCount);
  const Tensor &q = required(t, kQ, "q"), &k = required(t, kK, "k");
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && (!t[kV].has_value() || t[kV]->dim() == 3),
                  "q, k, v: expected 3 dimensions");
  check_bias(t, kQueryBias, kQuery, "query_bias");
  check_bias(t, kProjBias, kProj, "proj_bias");
  Attention a;
  a.batch = q.size(0);
  a.queries = q.size(1);
  a.q_channels = a.channels = q.size(2);
  a.keys = k.size(1);
  a.heads = heads;
  if (t[kQuery].has_value()) {
    STD_TORCH_CHECK(t[kQuery]->dim() == 2, "query_weight: expected 2 dimensions");
    a.channels = t[kQuery]->size(0);
  }
  a.value_channels = t[kV].has_value() ? t[kV]->size(2) : a.channels;
  STD_TORCH_CHECK(k.size(0) == a.batch && k.size(2) == (t[kV].has_value() ? 1 : 2) * a.channels,
                  "k: shape does not go with q");
  STD_TORCH_CHECK(!t[kV].has_value() || (t[kV]->size(0) == a.batch && t[kV]->size(1) == a.keys),
                  "v: shape does not go with k");
  STD_TORCH_CHECK(a.keys > 0, "k: expected at least one key");
  STD_TORCH_CHECK(
      heads > 0 && a.channels > 0 && a.value_channels > 0 && a.channels % heads == 0 && a.value_channels % heads == 0,
      "num_heads: does not divide the channels");
  STD_TORCH_CHECK(a.q_channels > 0, "q: expected at least one channel");
  STD_TORCH_CHECK(!add_query_input || a.q_channels == a.value_channels, "add_query_input: widths differ");
  a.out = a.value_channels;
  if (t[kProj].has_value()) {
    STD_TORCH_CHECK(t[kProj]->dim() == 2, "proj_weight: expected 2 dimensions");
    a.out = t[kProj]->size(0);
    STD_TORCH_CHECK(a.out > 0, "proj_weight: expected at least one row");
  }
  a.norm = norm_kind(norm);
  a.norm_eps = norm_eps;
  a.low_precision = kernel_dtype(dtype) == FK_BF16 && kernels().low_precision;
  auto look = [&] {
    a.proj = weight_view(t[kProj], "proj_weight", {a.out, a.value_channels});
    a.proj_bias = weight_view(t[kProjBias], "proj_bias", {a.out});
    a.norm_weight = weight_view(t[kNormWeight], "norm_weight", {a.q_channels});
    a.norm_bias = weight_view(t[kNormBias], "norm_bias", {a.q_channels});
    a.query = weight_view(t[kQuery], "query_weight", {a.channels, a.q_channels});
    a.query_bias = weight_view(t[kQueryBias], "query_bias", {a.channels});
    a.bias = weight_view(t[kBias], "attn_bias", {heads, a.queries, a.keys});
  };
  a.mark = identify({a.q_channels, a.channels, a.value_channels, a.out, a.low_precision, heads, a.norm}, t, kProj,
                    kBias + 1, packed, look);
  return a;
}

namespace {

Tensor prepare(const Attention& a, const std::optional<Tensor>& packed, fk_global_attention* to, bool kept = false) {
  // A panel of queries may start anywhere and reads a whole panel of biases.
  to->bias_stride = a.queries + kernels().panel;
  return pack_call(
      packed, a.mark,
      [&](Packer& p) {
        to->norm = norm_of(p, a.norm, a.norm_weight, a.norm_bias, a.norm_eps, a.q_channels);
        if (a.query.data) to->query = p.linear(a.query, a.query_bias, a.channels, a.q_channels, a.low_precision);
        if (a.proj.data) to->projection = p.linear(a.proj, a.proj_bias, a.out, a.value_channels, a.low_precision);
        if (a.bias.data) to->bias = p.table(a.bias, a.heads, a.queries, a.keys, to->bias_stride);
      },
      kept);
}

}  // namespace

std::tuple<Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, int64_t heads, double scale,
                               std::string norm, double norm_eps, bool add_query_input, bool return_statistics,
                               ScalarType dtype) {
  const Attention a = check(t, packed, heads, norm, norm_eps, add_query_input, dtype);
  struct Call {
    fk_global_attention p = {};
    const void* statistics = nullptr;
    void* summary = nullptr;
  };
  const auto call = std::make_shared<Call>();
  fk_global_attention& p = call->p;
  const Tensor block = prepare(a, packed, &p);
  const ScalarType out_dtype = promoted(dtype, t[kResidual]);
  Tensor out = empty({a.batch, a.queries, a.out}, out_dtype);
  p.q = rows_view(&t[kQ], "q", &p.q_stride);
  p.k = rows_view(&t[kK], "k", &p.k_stride);
  if (t[kV].has_value()) {
    p.v = rows_view(&t[kV], "v", &p.v_stride);
  } else {
    p.v = p.k;
    p.v_stride = p.k_stride;
    p.v.data = static_cast<const char*>(p.k.data) + a.channels * (p.k.dtype == FK_F32 ? 4 : 2);
  }
  p.residual = view(t[kResidual], "residual", {a.batch, a.queries, a.out});
  p.out = out.mutable_data_ptr();
  p.out_dtype = kernel_dtype(out_dtype);
  p.batch = a.batch;
  p.queries = a.queries;
  p.keys = a.keys;
  p.q_channels = a.q_channels;
  p.channels = a.channels;
  p.value_channels = a.value_channels;
  p.heads = heads;
  p.scale = static_cast<float>(scale);
  p.low_precision = a.low_precision;
  p.add_query_input = add_query_input;
  if (p.norm.kind == FK_GROUP_NORM) {
    if (p.q_stride != a.q_channels) t[kQ] = torch::stable::contiguous(*t[kQ]);
    p.q = view(*t[kQ], "q");
    p.q_stride = a.q_channels;
    call->statistics = group_statistics(p.norm, t[kStatistics], a.batch);
  }
  // An image's queries are cut evenly; with enough images no cut is needed for balance.
  const int64_t widest = std::max(a.value_channels, a.q_channels);
  const int64_t cached = kCacheBytes / (8 * std::max<int64_t>(1, widest));
  const int64_t most = std::min<int64_t>(224, std::max<int64_t>(32, cached));
  p.rows_per_task = rows_per_image_task(a.batch, a.queries, most);
  p.tasks_per_image = blocks(a.queries, p.rows_per_task);
  Tensor summary = return_statistics ? empty({a.batch, 2}, ScalarType::Float) : no_statistics();
  if (return_statistics) call->summary = summary.mutable_data_ptr();
  const int64_t out_channels = a.out;
  perform(
      [call, block, return_statistics, out_channels] {
        fk_global_attention& p = call->p;
        std::vector<float> groups;
        set_group_statistics(&p.norm, call->statistics, p.q, p.batch, 0, p.queries, p.q_channels, &groups);
        Moments moments(return_statistics ? p.batch : 0, p.tasks_per_image);
        p.moments = return_statistics ? moments.data() : nullptr;
        const fk_table& k = kernels();
        run_tasks(p.batch * p.tasks_per_image, k.scratch_global_attention(&p),
                  [&](int64_t task, void* memory) { k.global_attention(&p, task, memory); });
        if (return_statistics) moments.write(p.queries, out_channels, call->summary);
      },
      {&p.q.data, &p.k.data, &p.v.data, &p.residual.data, &p.out, &call->statistics, &call->summary}, {out, summary});
  return {out, summary};
}

namespace {

Tensor pack_only(TensorList t, int64_t heads, double, std::string norm, double norm_eps, bool add_query_input, bool,
                 ScalarType dtype) {
  fk_global_attention p = {};
  return prepare(check(t, std::nullopt, heads, norm, norm_eps, add_query_input, dtype), std::nullopt, &p, true);
}

}  // namespace
}  // namespace fk::global

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("global_attention", TORCH_BOX(&fk::global::run));
  m.impl("global_attention_pack", TORCH_BOX(&fk::global::pack_only));
}
