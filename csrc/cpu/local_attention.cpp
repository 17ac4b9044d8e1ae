#include <tuple>

#include "gradients.h"
#include "norms.h"

namespace fk {
namespace {

enum Index {
  kX,
  kK,
  kV,
  kNormWeight,
  kNormBias,
  kStatistics,
  kQkv,
  kQkvBias,
  kBias,
  kProj,
  kProjBias,
  kResidual,
  kCount
};

struct Attention {
  fk_array norm_weight, norm_bias, qkv, qkv_bias, bias, proj, proj_bias;
  int64_t batch, tokens, in_channels, channels, value_channels, out, heads, area;
  fk_norm_kind norm;
  double norm_eps;
  bool low_precision;
  uint64_t mark;
};

Attention check(TensorList& t, const std::optional<Tensor>& packed, const std::string& norm, double norm_eps,
                int64_t height, int64_t width, int64_t window, int64_t heads, ScalarType dtype) {
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

Tensor prepare(const Attention& a, const std::optional<Tensor>& packed, fk_local_attention* to) {
  to->bias_stride = a.area + kernels().panel;
  return pack(packed, a.mark, [&](Packer& p) {
    to->norm = norm_of(p, a.norm, a.norm_weight, a.norm_bias, a.norm_eps, a.in_channels);
    if (a.qkv.data) to->qkv = p.linear(a.qkv, a.qkv_bias, 3 * a.channels, a.in_channels, a.low_precision);
    if (a.proj.data) to->projection = p.linear(a.proj, a.proj_bias, a.out, a.value_channels, a.low_precision);
    if (a.bias.data) to->bias = p.table(a.bias, a.heads, a.area, a.area, to->bias_stride);
  });
}

std::tuple<Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::string norm, double norm_eps,
                               int64_t height, int64_t width, int64_t window, int64_t heads, double scale,
                               std::string pad, bool return_statistics, ScalarType dtype) {
  const Attention a = check(t, packed, norm, norm_eps, height, width, window, heads, dtype);
  STD_TORCH_CHECK(pad == "none" || pad == "mask" || pad == "zero", "pad: unknown name");
  STD_TORCH_CHECK(pad != "none" || (height % window == 0 && width % window == 0),
                  "grid: expected multiples of the window");
  fk_local_attention p = {};
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
  std::vector<float> groups;
  set_group_statistics(&p.norm, t[kStatistics], p.x, a.batch, 0, a.tokens, a.in_channels, &groups);
  const int64_t windows = blocks(height, window) * blocks(width, window);
  const int64_t widest = a.in_channels + 3 * a.channels + a.value_channels;
  const int64_t rows = std::min<int64_t>(224, 2 * kCacheBytes / (4 * widest));
  p.windows_per_task = rows_per_image_task(a.batch, windows, std::max<int64_t>(1, rows / a.area));
  p.tasks_per_image = blocks(windows, p.windows_per_task);
  Moments moments(return_statistics ? a.batch : 0, p.tasks_per_image);
  p.moments = return_statistics ? moments.data() : nullptr;
  const fk_table& k = kernels();
  run_tasks(a.batch * p.tasks_per_image, k.scratch_local_attention(&p),
            [&](int64_t task, void* memory) { k.local_attention(&p, task, memory); });
  return {out, return_statistics ? moments.tensor(a.tokens, a.out) : no_statistics()};
}

Tensor pack_only(TensorList t, std::string norm, double norm_eps, int64_t height, int64_t width, int64_t window,
                 int64_t heads, double, std::string, bool, ScalarType dtype) {
  fk_local_attention p = {};
  return prepare(check(t, std::nullopt, norm, norm_eps, height, width, window, heads, dtype), std::nullopt, &p);
}

// The tokens of every window of an image without padding.
std::vector<int64_t> window_tokens(int64_t height, int64_t width, int64_t window) {
  std::vector<int64_t> tokens;
  tokens.reserve(static_cast<size_t>(height * width));
  for (int64_t top = 0; top < height; top += window)
    for (int64_t left = 0; left < width; left += window)
      for (int64_t y = top; y < top + window; ++y)
        for (int64_t x = left; x < left + window; ++x) tokens.push_back(y * width + x);
  return tokens;
}

std::vector<Tensor> backward(Grads grads, TensorList t, Needs needs, std::string norm, double norm_eps, int64_t height,
                             int64_t width, int64_t window, int64_t heads, double scale, std::string pad,
                             bool return_statistics, ScalarType dtype) {
  const Attention a = check(t, std::nullopt, norm, norm_eps, height, width, window, heads, dtype);
  STD_TORCH_CHECK(pad == "none" || pad == "mask" || pad == "zero", "pad: unknown name");
  STD_TORCH_CHECK(height % window == 0 && width % window == 0, "local_attention_backward: no kernels for padding");
  STD_TORCH_CHECK(a.norm != FK_GROUP_NORM && !return_statistics && !t[kStatistics].has_value(),
                  "local_attention_backward: no kernels for these gradients");
  const fk_array grad = grad_view(grads, 0, 2, {a.batch, a.tokens, a.out}, promoted(dtype, t[kResidual]));
  view(t[kResidual], "residual", {a.batch, a.tokens, a.out});
  const fk_array x = view(*t[kX], "x");
  const int64_t rows = a.batch * a.tokens;

  fk_local_attention forward = {};
  fk_linear to_projection = {}, to_qkv = {};
  forward.bias_stride = a.area + kernels().panel;
  const Tensor block = pack_once([&](Packer& p) {
    forward.norm = norm_of(p, a.norm, a.norm_weight, a.norm_bias, a.norm_eps, a.in_channels);
    if (a.qkv.data) forward.qkv = p.linear(a.qkv, a.qkv_bias, 3 * a.channels, a.in_channels, a.low_precision);
    if (a.qkv.data) to_qkv = p.transposed(a.qkv, a.in_channels, 3 * a.channels, a.low_precision);
    if (a.proj.data) to_projection = p.transposed(a.proj, a.value_channels, a.out, a.low_precision);
    if (a.bias.data) forward.bias = p.table(a.bias, heads, a.area, a.area, forward.bias_stride);
  });

  Gradients found(t, needs);
  const fk_table& k = kernels();
  const std::vector<int64_t> tokens = window_tokens(height, width, window);
  fk_attention_backward p = {};
  p.window_tokens = tokens.data();
  p.tokens = a.tokens;
  p.sets_per_image = (height / window) * (width / window);
  p.sets = p.partials = a.batch * p.sets_per_image;
  if (found.wants(kBias)) p.partials = partial_count(p.sets, 4 * heads * a.area * a.area);
  p.bias_sums = found.table_sums(kBias, p.partials, heads, a.area, a.area);
  p.bias = forward.bias;
  p.bias_stride = forward.bias_stride;
  p.queries = p.keys = a.area;
  p.channels = a.channels;
  p.value_channels = a.value_channels;
  p.heads = heads;
  p.scale = static_cast<float>(scale);
  p.low_precision = a.low_precision;

  // q, k and v: three tensors, or side by side in one.
  Temporary qkv, qkv_slopes, slopes, results;
  const bool projects = a.qkv.data;
  const bool wants_qkv = projects && (found.wants(kX) || found.wants(kNormWeight) || found.wants(kNormBias) ||
                                      found.wants(kQkv) || found.wants(kQkvBias));
  if (t[kK].has_value()) {
    p.q = x;
    p.k = view(t[kK], "k", {a.batch, a.tokens, a.channels});
    p.v = view(t[kV], "v", {a.batch, a.tokens, a.value_channels});
    p.q_stride = p.k_stride = a.channels;
    p.v_stride = a.value_channels;
    p.dq = found.data(kX);
    p.dk = found.data(kK);
    p.dv = found.data(kV);
  } else {
    void* slopes_of_all = found.data(kX);
    p.q = x;
    if (projects) {
      qkv = temporary(rows, 3 * a.channels, a.low_precision);
      fk_linear_forward f = {};
      f.x = x;
      f.norm = forward.norm;
      f.linear = forward.qkv;
      f.low_precision = a.low_precision;
      f.rows = rows;
      f.n = 3 * a.channels;
      f.k = a.in_channels;
      f.rows_per_task = rows_per_task(rows, 112);
      f.out = qkv.tensor.mutable_data_ptr();
      run_tasks(blocks(rows, f.rows_per_task), k.scratch_linear_forward(&f),
                [&](int64_t task, void* memory) { k.linear_forward(&f, task, memory); });
      p.q = qkv.array;
      if (wants_qkv) qkv_slopes = temporary(rows, 3 * a.channels, a.low_precision);
      slopes_of_all = wants_qkv ? qkv_slopes.tensor.mutable_data_ptr() : nullptr;
    }
    p.q_stride = p.k_stride = p.v_stride = 3 * a.channels;
    const int64_t bytes = a.channels * (p.q.dtype == FK_F32 ? 4 : 2);
    p.k = p.v = p.q;
    p.k.data = static_cast<const char*>(p.q.data) + bytes;
    p.v.data = static_cast<const char*>(p.q.data) + 2 * bytes;
    p.dq = slopes_of_all;
    p.dk = slopes_of_all ? static_cast<char*>(slopes_of_all) + bytes : nullptr;
    p.dv = slopes_of_all ? static_cast<char*>(slopes_of_all) + 2 * bytes : nullptr;
  }
  p.dq_dtype = p.q.dtype;
  p.dq_stride = p.q_stride;
  p.dk_stride = p.k_stride;
  p.dv_stride = p.v_stride;

  p.grad = grad;
  if (a.proj.data && (p.dq || p.dk || p.dv || p.bias_sums)) {
    slopes = temporary(rows, a.value_channels, a.low_precision);
    fk_linear_backward b = {};
    b.x.dtype = slopes.array.dtype;
    b.grad = grad;
    b.to_input = to_projection;
    b.low_precision = a.low_precision;
    b.rows = rows;
    b.n = a.out;
    b.k = a.value_channels;
    b.dx = slopes.tensor.mutable_data_ptr();
    run_linear_backward(&b, found, {});
    p.grad = slopes.array;
  }
  if (found.wants(kProj)) {
    results = temporary(rows, a.value_channels, a.low_precision);
    p.result = results.tensor.mutable_data_ptr();
  }
  if (p.dq || p.dk || p.dv || p.result || p.bias_sums)
    run_tasks(p.partials * heads, k.scratch_attention_backward(&p),
              [&](int64_t task, void* memory) { k.attention_backward(&p, task, memory); });
  if (found.wants(kProj) || found.wants(kProjBias)) {
    fk_linear_backward b = {};
    b.x = results.array;
    b.grad = grad;
    b.low_precision = a.low_precision;
    b.rows = rows;
    b.n = a.out;
    b.k = a.value_channels;
    run_linear_backward(&b, found, {kProj, kProjBias});
  }
  if (wants_qkv) {
    fk_linear_backward b = {};
    b.x = x;
    b.grad = qkv_slopes.array;
    b.norm = forward.norm;
    b.to_input = to_qkv;
    b.low_precision = a.low_precision;
    b.rows = rows;
    b.n = 3 * a.channels;
    b.k = a.in_channels;
    b.dx = found.data(kX);
    run_linear_backward(&b, found, {kQkv, kQkvBias, kNormWeight, kNormBias});
  }
  found.copy(kResidual, grads[0]);
  return found.finish();
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("local_attention", TORCH_BOX(&fk::run));
  m.impl("local_attention_pack", TORCH_BOX(&fk::pack_only));
  m.impl("local_attention_backward.native", TORCH_BOX(&fk::backward));
}
