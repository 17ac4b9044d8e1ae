#include "local_attention.h"

namespace fk::local {

Attention check(TensorList& t, const std::optional<Tensor>& packed, const std::string& norm, double norm_eps,
                int64_t height, int64_t width, int64_t window, int64_t heads, const std::string& pad,
                ScalarType dtype) {
  check_count(t, kCount);
  const Tensor& x = required(t, kX, "x");
  STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions");
  Attention a;
  a.batch = x.size(0);
  a.tokens = x.size(1);
  a.in_channels = x.size(2);
  a.heads = heads;
  STD_TORCH_CHECK(a.in_channels > 0, "x: expected at least one channel");
  check_grid(a.tokens, 0, height, width);
  // Larger windows than the map would be padding only; their square must not overflow.
  STD_TORCH_CHECK(window > 0 && window <= 4096, "window_size: expected 1 to 4096");
  a.area = window * window;
  STD_TORCH_CHECK(pad == "none" || pad == "mask" || pad == "zero", "pad: unknown name");
  STD_TORCH_CHECK(pad != "none" || (height % window == 0 && width % window == 0),
                  "grid: expected multiples of the window");
  STD_TORCH_CHECK(t[kK].has_value() == t[kV].has_value(), "k, v: expected both or none");
  STD_TORCH_CHECK(!t[kK].has_value() || !t[kQkv].has_value(), "qkv_weight: expected none beside k and v");
  check_bias(t, kQkvBias, kQkv, "qkv_bias");
  check_bias(t, kProjBias, kProj, "proj_bias");
  if (t[kQkv].has_value()) {
    STD_TORCH_CHECK(t[kQkv]->dim() == 2 && t[kQkv]->size(0) % 3 == 0, "qkv_weight: expected [3 C, C_in]");
    a.channels = a.value_channels = t[kQkv]->size(0) / 3;
  } else if (t[kK].has_value()) {
    STD_TORCH_CHECK(t[kK]->dim() == 3 && t[kV]->dim() == 3, "k, v: expected 3 dimensions");
    a.channels = a.in_channels;
    a.value_channels = t[kV]->size(2);
  } else {
    STD_TORCH_CHECK(a.in_channels % 3 == 0, "x: expected [B, H * W, 3 C]");
    a.channels = a.value_channels = a.in_channels / 3;
  }
  STD_TORCH_CHECK(
      heads > 0 && a.channels > 0 && a.value_channels > 0 && a.channels % heads == 0 && a.value_channels % heads == 0,
      "num_heads: does not divide the channels");
  a.out = a.value_channels;
  if (t[kProj].has_value()) {
    STD_TORCH_CHECK(t[kProj]->dim() == 2, "proj_weight: expected 2 dimensions");
    a.out = t[kProj]->size(0);
    STD_TORCH_CHECK(a.out > 0, "proj_weight: expected at least one row");
  }
  a.norm = norm_kind(norm);
  STD_TORCH_CHECK(a.norm == FK_NO_NORM || t[kQkv].has_value(), "norm: expected a qkv_weight behind it");
  a.norm_eps = norm_eps;
  a.low_precision = kernel_dtype(dtype) == FK_BF16 && kernels().low_precision;
  // Statistics are no weights: they change from call to call.
  const std::optional<Tensor> statistics = t[kStatistics];
  t[kStatistics].reset();
  auto look = [&] {
    a.norm_weight = weight_view(t[kNormWeight], "norm_weight", {a.in_channels});
    a.norm_bias = weight_view(t[kNormBias], "norm_bias", {a.in_channels});
    a.qkv = weight_view(t[kQkv], "qkv_weight", {3 * a.channels, a.in_channels});
    a.qkv_bias = weight_view(t[kQkvBias], "qkv_bias", {3 * a.channels});
    a.bias = weight_view(t[kBias], "attn_bias", {heads, a.area, a.area});
    a.proj = weight_view(t[kProj], "proj_weight", {a.out, a.value_channels});
    a.proj_bias = weight_view(t[kProjBias], "proj_bias", {a.out});
  };
  // Only the bias is packed for a size of windows.
  const int64_t area = t[kBias].has_value() ? a.area : 0;
  a.mark = identify({a.in_channels, a.channels, a.value_channels, a.out, a.low_precision, heads, a.norm, area}, t,
                    kNormWeight, kResidual, packed, look);
  t[kStatistics] = statistics;
  return a;
}

namespace {

Tensor prepare(const Attention& a, const std::optional<Tensor>& packed, fk_local_attention* to, bool kept = false) {
  to->bias_stride = a.area + kernels().panel;
  return pack_call(
      packed, a.mark,
      [&](Packer& p) {
        to->norm = norm_of(p, a.norm, a.norm_weight, a.norm_bias, a.norm_eps, a.in_channels);
        if (a.qkv.data) to->qkv = p.linear(a.qkv, a.qkv_bias, 3 * a.channels, a.in_channels, a.low_precision);
        if (a.proj.data) to->projection = p.linear(a.proj, a.proj_bias, a.out, a.value_channels, a.low_precision);
        if (a.bias.data) to->bias = p.table(a.bias, a.heads, a.area, a.area, to->bias_stride);
      },
      kept);
}

}  // namespace

std::tuple<Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::string norm, double norm_eps,
                               int64_t height, int64_t width, int64_t window, int64_t heads, double scale,
                               std::string pad, bool return_statistics, ScalarType dtype) {
  const Attention a = check(t, packed, norm, norm_eps, height, width, window, heads, pad, dtype);
  struct Call {
    fk_local_attention p = {};
    const void* statistics = nullptr;
    void* summary = nullptr;
  };
  const auto call = std::make_shared<Call>();
  fk_local_attention& p = call->p;
  const Tensor block = prepare(a, packed, &p);
  const ScalarType out_dtype = promoted(dtype, t[kResidual]);
  Tensor out = empty({a.batch, a.tokens, a.out}, out_dtype);
  p.x = view(*t[kX], "x");
  p.k = view(t[kK], "k", {a.batch, a.tokens, a.channels});
  p.v = view(t[kV], "v", {a.batch, a.tokens, a.value_channels});
  p.residual = view(t[kResidual], "residual", {a.batch, a.tokens, a.out});
  p.out = out.mutable_data_ptr();
  p.out_dtype = kernel_dtype(out_dtype);
  p.batch = a.batch;
  p.height = height;
  p.width = width;
  p.in_channels = a.in_channels;
  p.channels = a.channels;
  p.value_channels = a.value_channels;
  p.heads = heads;
  p.window = window;
  p.scale = static_cast<float>(scale);
  p.masked = pad == "mask";
  p.low_precision = a.low_precision;
  call->statistics = group_statistics(p.norm, t[kStatistics], a.batch);
  const int64_t windows = blocks(height, window) * blocks(width, window);
  const int64_t widest = a.in_channels + 3 * a.channels + a.value_channels;
  const int64_t rows = std::min<int64_t>(224, 2 * kCacheBytes / (4 * widest));
  p.windows_per_task = rows_per_image_task(a.batch, windows, std::max<int64_t>(1, rows / a.area));
  p.tasks_per_image = blocks(windows, p.windows_per_task);
  Tensor summary = return_statistics ? empty({a.batch, 2}, ScalarType::Float) : no_statistics();
  if (return_statistics) call->summary = summary.mutable_data_ptr();
  const int64_t tokens = a.tokens, out_channels = a.out;
  perform(
      [call, block, return_statistics, tokens, out_channels] {
        fk_local_attention& p = call->p;
        std::vector<float> groups;
        set_group_statistics(&p.norm, call->statistics, p.x, p.batch, 0, tokens, p.in_channels, &groups);
        Moments moments(return_statistics ? p.batch : 0, p.tasks_per_image);
        p.moments = return_statistics ? moments.data() : nullptr;
        const fk_table& k = kernels();
        run_tasks(p.batch * p.tasks_per_image, k.scratch_local_attention(&p),
                  [&](int64_t task, void* memory) { k.local_attention(&p, task, memory); });
        if (return_statistics) moments.write(tokens, out_channels, call->summary);
      },
      {&p.x.data, &p.k.data, &p.v.data, &p.residual.data, &p.out, &call->statistics, &call->summary}, {out, summary});
  return {out, summary};
}

namespace {

Tensor pack_only(TensorList t, std::string norm, double norm_eps, int64_t height, int64_t width, int64_t window,
                 int64_t heads, double, std::string pad, bool, ScalarType dtype) {
  fk_local_attention p = {};
  return prepare(check(t, std::nullopt, norm, norm_eps, height, width, window, heads, pad, dtype), std::nullopt, &p,
                 true);
}

}  // namespace
}  // namespace fk::local

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("local_attention", TORCH_BOX(&fk::local::run));
  m.impl("local_attention_pack", TORCH_BOX(&fk::local::pack_only));
}
