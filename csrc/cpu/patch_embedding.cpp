#include "packed.h"

namespace fk {
namespace {

struct Embedding {
  fk_array weight, bias, norm_weight, norm_bias, in_norm_weight, in_norm_bias;
  std::optional<double> norm_eps, in_norm_eps;
  int64_t batch, height, width, channels, kernel, out;
  bool low_precision;
  uint64_t mark;
};

struct Weights {
  fk_linear linear;
  fk_norm in_norm, norm;
};

Embedding check(TensorList& t, const std::optional<Tensor>& packed, std::optional<double> norm_eps,
                std::optional<double> in_norm_eps, int64_t stride, int64_t padding, ScalarType dtype) {
  check_count(t, 7);
  const Tensor &x = required(t, 0, "x"), &weight = required(t, 1, "weight");
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x, weight: expected 4 dimensions");
  Embedding e;
  e.batch = x.size(0);
  e.height = x.size(1);
  e.width = x.size(2);
  e.channels = x.size(3);
  e.out = weight.size(0);
  e.kernel = weight.size(3);
  e.low_precision = kernel_dtype(dtype) == FK_BF16 && kernels().low_precision;
  auto look = [&] {
    e.weight = weight_view(t[1], "weight", {e.out, e.channels, e.kernel, e.kernel});
    e.bias = weight_view(t[2], "bias", {e.out});
    e.norm_weight = weight_view(t[3], "norm_weight", {e.out});
    e.norm_bias = weight_view(t[4], "norm_bias", {e.out});
    e.in_norm_weight = weight_view(t[5], "in_norm_weight", {e.channels});
    e.in_norm_bias = weight_view(t[6], "in_norm_bias", {e.channels});
  };
  e.mark = identify({e.out, e.channels, e.kernel, e.low_precision, norm_eps.has_value(), in_norm_eps.has_value()}, t, 1,
                    7, packed, look);
  e.norm_eps = norm_eps;
  e.in_norm_eps = in_norm_eps;
  check_window(e.kernel, stride, padding, e.height, e.width);
  return e;
}

Tensor prepare(const Embedding& e, const std::optional<Tensor>& packed, Weights* w) {
  return pack(packed, e.mark, [&](Packer& p) {
    const int64_t taps = e.kernel * e.kernel;
    w->linear = p.linear(e.weight, e.bias, e.out, taps * e.channels, e.low_precision, taps);
    w->in_norm = norm_of(p, e.in_norm_weight, e.in_norm_bias, e.in_norm_eps, e.channels);
    w->norm = norm_of(p, e.norm_weight, e.norm_bias, e.norm_eps, e.out);
  });
}

Tensor run(TensorList t, std::optional<Tensor> packed, std::optional<double> norm_eps,
           std::optional<double> in_norm_eps, int64_t stride, int64_t padding, ScalarType dtype, ScalarType out_dtype) {
  const Embedding e = check(t, packed, norm_eps, in_norm_eps, stride, padding, dtype);
  Weights w;
  const Tensor block = prepare(e, packed, &w);
  fk_patch_embedding p = {};
  p.x = view(*t[0], "x");
  p.out_dtype = kernel_dtype(out_dtype);
  p.linear = w.linear;
  p.in_norm = w.in_norm;
  p.norm = w.norm;
  p.batch = e.batch;
  p.height = e.height;
  p.width = e.width;
  p.channels = e.channels;
  p.kernel = e.kernel;
  p.stride = stride;
  p.padding = padding;
  p.out_h = (e.height + 2 * padding - e.kernel) / stride + 1;
  p.out_w = (e.width + 2 * padding - e.kernel) / stride + 1;
  Tensor out = empty({e.batch, p.out_h, p.out_w, e.out}, out_dtype);
  p.out = out.mutable_data_ptr();
  const int64_t rows = e.batch * p.out_h * p.out_w;
  const int64_t cached = kCacheBytes / (4 * std::max<int64_t>(1, w.linear.k + e.out));
  p.rows_per_task = rows_per_task(rows, std::min<int64_t>(224, std::max<int64_t>(28, cached)));
  const fk_table& k = kernels();
  run_tasks(blocks(rows, p.rows_per_task), k.scratch_patch_embedding(&p),
            [&](int64_t task, void* memory) { k.patch_embedding(&p, task, memory); });
  return out;
}

Tensor pack_only(TensorList t, std::optional<double> norm_eps, std::optional<double> in_norm_eps, int64_t stride,
                 int64_t padding, ScalarType dtype, ScalarType) {
  Weights w;
  return prepare(check(t, std::nullopt, norm_eps, in_norm_eps, stride, padding, dtype), std::nullopt, &w);
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("patch_embedding", TORCH_BOX(&fk::run));
  m.impl("patch_embedding_pack", TORCH_BOX(&fk::pack_only));
}
