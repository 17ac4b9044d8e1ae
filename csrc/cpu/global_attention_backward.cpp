#include "global_attention.h"
#include "gradients.h"
#include "statistics_gradients.h"

namespace fk::global {
namespace {

// What the queries are made from, where that is not q itself: normalised rows, which the result may take up as well.
struct Rows {
  fk_norm norm;
  std::vector<float> groups;
  fk_linear query, to_input;
  Temporary normed, queries;
};

std::vector<Tensor> backward(Grads grads, TensorList t, Needs needs, int64_t heads, double scale, std::string norm,
                             double norm_eps, bool add_query_input, bool return_statistics, ScalarType dtype) {
  const Attention a = check(t, std::nullopt, heads, norm, norm_eps, add_query_input, dtype);
  STD_TORCH_CHECK(!t[kStatistics].has_value() || a.norm == FK_GROUP_NORM, "norm_statistics: there is no GroupNorm");
  const ScalarType out_dtype = promoted(dtype, t[kResidual]);
  const auto given = take_results(grads, {a.batch, a.queries, a.out}, out_dtype);
  fk_array grad = grad_view(grads, 0, 2, {a.batch, a.queries, a.out}, out_dtype);
  view(t[kResidual], "residual", {a.batch, a.queries, a.out});
  const int64_t rows = a.batch * a.queries;
  const bool own = takes_own(needs, kCount);
  STD_TORCH_CHECK(!own || !return_statistics, "needs: the statistics depend on the residual");
  t[kQ] = torch::stable::contiguous(*t[kQ]);
  Gradients found(t, needs, true);
  Tensor of_result = grads[0];
  if (return_statistics) {
    const fk_array slopes = grad_view(grads, 1, 2, {a.batch, 2}, ScalarType::Float);
    of_result = with_statistics(grads[0], slopes, a.queries, a.out, given, [&] {
      return run(t, std::nullopt, heads, scale, norm, norm_eps, add_query_input, true, dtype);
    });
    grad = view(of_result, "grads");
  }
  found.copy(kResidual, of_result);

  Rows q = {};
  fk_global_attention forward = {};
  fk_linear to_projection = {};
  forward.bias_stride = a.queries + kernels().panel;
  const Tensor block = pack_once([&](Packer& p) {
    q.norm = norm_of(p, a.norm, a.norm_weight, a.norm_bias, a.norm_eps, a.q_channels);
    if (a.query.data) q.query = p.linear(a.query, a.query_bias, a.channels, a.q_channels, a.low_precision);
    if (a.query.data) q.to_input = p.transposed(a.query, a.q_channels, a.channels, a.low_precision);
    if (a.proj.data) to_projection = p.transposed(a.proj, a.value_channels, a.out, a.low_precision);
    if (a.bias.data) forward.bias = p.table(a.bias, heads, a.queries, a.keys, forward.bias_stride);
  });

  fk_attention_backward p = {};
  p.q = view(*t[kQ], "q");
  p.q_stride = a.channels;
  set_group_statistics(&q.norm, group_statistics(q.norm, t[kStatistics], a.batch), p.q, a.batch, 0, a.queries,
                       a.q_channels, &q.groups);
  p.k = rows_view(&t[kK], "k", &p.k_stride);
  p.dk_stride = t[kK]->size(2);
  p.dk = found.data(kK);
  if (t[kV].has_value()) {
    p.v = rows_view(&t[kV], "v", &p.v_stride);
    p.dv_stride = a.value_channels;
    p.dv = found.data(kV);
  } else {
    const int64_t keys_bytes = a.channels * (p.k.dtype == FK_F32 ? 4 : 2);
    p.v = p.k;
    p.v.data = static_cast<const char*>(p.k.data) + keys_bytes;
    p.v_stride = p.k_stride;
    p.dv_stride = p.dk_stride;
    p.dv = p.dk ? static_cast<char*>(p.dk) + keys_bytes : nullptr;
  }
  p.queries = a.queries;
  p.keys = a.keys;
  p.channels = a.channels;
  p.value_channels = a.value_channels;
  p.dq_stride = a.channels;
  p.heads = heads;
  p.scale = static_cast<float>(scale);
  p.low_precision = a.low_precision;
  p.sets = p.partials = a.batch;
  if (found.wants(kBias)) p.partials = partial_count(a.batch, 4 * heads * a.queries * a.keys);
  p.bias_sums = found.table_sums(kBias, p.partials, heads, a.queries, a.keys);
  p.bias = forward.bias;
  p.bias_stride = forward.bias_stride;

  const bool prepares = a.norm != FK_NO_NORM || a.query.data || add_query_input;
  const bool wants_queries = found.wants(kQ) || found.wants(kNormWeight) || found.wants(kNormBias) ||
                             found.wants(kStatistics) || found.wants(kQuery) || found.wants(kQueryBias);
  STD_TORCH_CHECK(prepares || !own, "needs: nothing is between the residual and the attention");
  // Normalised rows are kept where more than one step needs them, or a norm whose statistics span many rows.
  const bool apart = a.norm == FK_GROUP_NORM || add_query_input;
  if (apart) {
    q.normed = run_linear(p.q, q.norm, a.queries, {}, rows, a.q_channels, a.q_channels, a.low_precision);
    p.added = add_query_input ? q.normed.array.data : nullptr;
    p.q = q.normed.array;
  }
  if (prepares && (a.query.data || !apart)) {
    q.queries = run_linear(p.q, apart ? fk_norm{} : q.norm, a.queries, q.query, rows, a.channels, a.q_channels,
                           a.low_precision);
    p.q = q.queries.array;
  }
  Temporary slopes, results, query_slopes;
  p.grad = grad;
  if (a.proj.data && (wants_queries || p.dk || p.dv || p.bias_sums)) {
    slopes = linear_input_gradients(grad, to_projection, rows, a.out, a.value_channels, a.low_precision, found);
    p.grad = slopes.array;
  }
  if (found.wants(kProj)) {
    results = temporary(rows, a.value_channels, a.low_precision);
    p.result = results.tensor.mutable_data_ptr();
  }
  if (prepares && wants_queries) {
    query_slopes = temporary(rows, a.channels, a.low_precision);
    p.dq = query_slopes.tensor.mutable_data_ptr();
    p.dq_dtype = query_slopes.array.dtype;
  } else if (wants_queries) {
    p.dq = found.data(kQ);
    p.dq_dtype = p.q.dtype;
  }
  const fk_table& k = kernels();
  if (p.dq || p.dk || p.dv || p.result || p.bias_sums)
    run_tasks(p.partials * heads, k.scratch_attention_backward(&p),
              [&](int64_t task, void* memory) { k.attention_backward(&p, task, memory); });
  if (found.wants(kProj) || found.wants(kProjBias))
    linear_weight_gradients(results.array, grad, rows, a.out, a.value_channels, a.low_precision, {kProj, kProjBias},
                            found);
  if (prepares && wants_queries) {
    const fk_array input = view(*t[kQ], "q");
    fk_linear_backward b = {};
    b.x = apart ? q.normed.array : input;
    b.grad = query_slopes.array;
    b.to_input = q.to_input;
    b.low_precision = a.low_precision;
    b.rows = rows;
    b.n = a.channels;
    b.k = a.q_channels;
    if (apart) {
      Memory memory;
      b.inputs = memory.take<float>(rows * a.q_channels);
      if (add_query_input) b.added = p.grad;
      run_linear_backward(&b, found, {kQuery, kQueryBias});
      norm_gradients(input, q.norm, t[kStatistics].has_value(), b.inputs, a.batch, a.queries, a.q_channels,
                     {kQ, kNormWeight, kNormBias, kStatistics}, &found, found.own(kQ, grad));
    } else {
      b.norm = q.norm;
      b.dx = found.data(kQ);
      b.own = found.own(kQ, grad);
      run_linear_backward(&b, found, {kQuery, kQueryBias, kNormWeight, kNormBias});
    }
  }
  return found.finish();
}

}  // namespace
}  // namespace fk::global

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("global_attention_backward.native", TORCH_BOX(&fk::global::backward));
}
