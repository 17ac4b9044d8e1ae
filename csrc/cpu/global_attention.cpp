#include "packed.h"

namespace fk {
namespace {

struct Attention {
  fk_array weight, bias;
  int64_t batch, queries, keys, channels, value_channels, out;
  bool low_precision;
  uint64_t mark;
};

Attention check(TensorList& t, const std::optional<Tensor>& packed, int64_t heads, ScalarType dtype) {
  check_count(t, 6);
  const Tensor &q = required(t, 0, "q"), &k = required(t, 1, "k"), &v = required(t, 2, "v");
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k, v: expected 3 dimensions");
  Attention a;
  a.batch = q.size(0);
  a.queries = q.size(1);
  a.channels = q.size(2);
  a.keys = k.size(1);
  a.value_channels = v.size(2);
  STD_TORCH_CHECK(k.size(0) == a.batch && v.size(0) == a.batch && k.size(2) == a.channels && v.size(1) == a.keys,
                  "k, v: shapes do not go with q");
  STD_TORCH_CHECK(a.keys > 0, "k: expected at least one key");
  STD_TORCH_CHECK(heads > 0 && a.channels % heads == 0 && a.value_channels % heads == 0,
                  "num_heads: does not divide the channels");
  a.out = a.value_channels;
  if (t[3].has_value()) {
    STD_TORCH_CHECK(t[3]->dim() == 2, "proj_weight: expected 2 dimensions");
    a.out = t[3]->size(0);
  }
  a.low_precision = kernel_dtype(dtype) == FK_BF16 && kernels().low_precision;
  a.mark = identify({a.value_channels, a.out, a.low_precision}, t, 3, 5, packed);
  a.weight = weight_view(t[3], "proj_weight", {a.out, a.value_channels});
  a.bias = weight_view(t[4], "proj_bias", {a.out});
  return a;
}

Tensor prepare(const Attention& a, const std::optional<Tensor>& packed, fk_linear* projection) {
  return pack(packed, a.mark, [&](Packer& p) {
    *projection = a.weight.data ? p.linear(a.weight, a.bias, a.out, a.value_channels, a.low_precision) : fk_linear{};
  });
}

Tensor run(TensorList t, std::optional<Tensor> packed, int64_t heads, double scale, ScalarType dtype) {
  const Attention a = check(t, packed, heads, dtype);
  fk_global_attention p = {};
  const Tensor block = prepare(a, packed, &p.projection);
  const ScalarType out_dtype = promoted(dtype, t[5]);
  Tensor out = empty({a.batch, a.queries, a.out}, out_dtype);
  p.q = view(*t[0], "q");
  p.k = view(*t[1], "k");
  p.v = view(*t[2], "v");
  p.residual = view(t[5], "residual", {a.batch, a.queries, a.out});
  p.out = out.mutable_data_ptr();
  p.out_dtype = kernel_dtype(out_dtype);
  p.batch = a.batch;
  p.queries = a.queries;
  p.keys = a.keys;
  p.channels = a.channels;
  p.value_channels = a.value_channels;
  p.heads = heads;
  p.scale = static_cast<float>(scale);
  p.low_precision = a.low_precision;
  // An image's queries are cut evenly; with enough images no cut is needed for balance.
  const int64_t cached = kCacheBytes / (8 * std::max<int64_t>(1, a.value_channels));
  const int64_t most = std::min<int64_t>(224, std::max<int64_t>(32, cached));
  p.rows_per_task = rows_per_image_task(a.batch, a.queries, most);
  p.tasks_per_image = blocks(a.queries, p.rows_per_task);
  const fk_table& k = kernels();
  run_tasks(a.batch * p.tasks_per_image, k.scratch_global_attention(&p),
            [&](int64_t task, void* memory) { k.global_attention(&p, task, memory); });
  return out;
}

Tensor pack_only(TensorList t, int64_t heads, double, ScalarType dtype) {
  fk_linear projection;
  return prepare(check(t, std::nullopt, heads, dtype), std::nullopt, &projection);
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("global_attention", TORCH_BOX(&fk::run));
  m.impl("global_attention_pack", TORCH_BOX(&fk::pack_only));
}
