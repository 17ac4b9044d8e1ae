#include <cmath>
#include <cstring>

#include "gradients.h"
#include "local_attention.h"
#include "statistics_gradients.h"

namespace fk::local {
namespace {

// Where the pixels of windows lie: in the map itself, or, where windows reach beyond it, in rows of their own.
class Windows {
 public:
  Windows(int64_t images, int64_t height, int64_t width, int64_t window)
      : images_(images), tokens_(height * width), padded_(height % window != 0 || width % window != 0) {
    for (int64_t top = 0; top < height; top += window)
      for (int64_t left = 0; left < width; left += window)
        for (int64_t y = top; y < top + window; ++y)
          for (int64_t x = left; x < left + window; ++x)
            pixels_.push_back(y < height && x < width ? y * width + x : -1);
    sets_ = static_cast<int64_t>(pixels_.size()) / (window * window);
  }

  bool padded() const { return padded_; }
  int64_t sets_per_image() const { return sets_; }
  int64_t rows() const { return images_ * (padded_ ? static_cast<int64_t>(pixels_.size()) : tokens_); }
  // The token of each row of a window, where windows lie in the map.
  const int64_t* tokens() const { return padded_ ? nullptr : pixels_.data(); }
  // For each window, what is added to the scores of a key: nothing, or minus infinity beside the map.
  std::vector<float> mask() const {
    std::vector<float> mask;
    for (int64_t pixel : pixels_) mask.push_back(pixel < 0 ? -INFINITY : 0.0f);
    return mask;
  }

  // Rows of the map to where the windows take them, zeros beside it.
  Temporary gather(const fk_array& map, int64_t columns) const {
    Temporary to = rows_like(map, columns);
    const int64_t bytes = columns * (map.dtype == FK_F32 ? 4 : 2);
    each_row([&](int64_t row, int64_t token) {
      char* at = static_cast<char*>(to.tensor.mutable_data_ptr()) + row * bytes;
      if (token < 0)
        std::memset(at, 0, static_cast<size_t>(bytes));
      else
        std::memcpy(at, static_cast<const char*>(map.data) + token * bytes, static_cast<size_t>(bytes));
    });
    return to;
  }
  // The other way round; what lies beside the map is dropped.
  void scatter(const void* rows, int64_t bytes, void* map) const {
    each_row([&](int64_t row, int64_t token) {
      if (token >= 0)
        std::memcpy(static_cast<char*>(map) + token * bytes, static_cast<const char*>(rows) + row * bytes,
                    static_cast<size_t>(bytes));
    });
  }
  Temporary rows_like(const fk_array& map, int64_t columns) const {
    return temporary(rows(), columns, map.dtype == FK_BF16);
  }

 private:
  template <class Body>
  void each_row(const Body& body) const {
    const int64_t per_image = static_cast<int64_t>(pixels_.size());
    run_tasks(images_ * sets_, 0, [&](int64_t set, void*) {
      const int64_t image = set / sets_, area = per_image / sets_;
      for (int64_t i = set % sets_ * area; i < (set % sets_ + 1) * area; ++i)
        body(image * per_image + i, pixels_[i] < 0 ? -1 : image * tokens_ + pixels_[i]);
    });
  }

  int64_t images_, tokens_, sets_ = 0;
  bool padded_;
  std::vector<int64_t> pixels_;
};

// A tensor that the attention reads, and the gradient that it writes, in the rows of the windows.
struct Operand {
  Temporary rows, slopes;
  fk_array array;
  void* slope = nullptr;
  int64_t columns = 0;
  size_t index = kNowhere;
};

Operand operand(const Windows& windows, const Tensor& tensor, size_t index, Gradients& found) {
  Operand o;
  o.array = view(tensor, "x, k, v");
  o.columns = tensor.size(2);
  o.index = index;
  if (!windows.padded()) {
    o.slope = found.data(index);
    return o;
  }
  if (found.wants(index)) {
    o.slopes = windows.rows_like(o.array, o.columns);
    o.slope = o.slopes.tensor.mutable_data_ptr();
  }
  o.rows = windows.gather(o.array, o.columns);
  o.array = o.rows.array;
  return o;
}

void finish(const Windows& windows, const Operand& o, Gradients& found) {
  if (windows.padded() && o.slope)
    windows.scatter(o.slope, o.columns * (o.array.dtype == FK_F32 ? 4 : 2), found.data(o.index));
}

// Queries, keys and values side by side in rows of three times their width.
void set_packed(const Attention& a, const fk_array& qkv, void* slopes, fk_attention_backward* p) {
  const int64_t bytes = a.channels * (qkv.dtype == FK_F32 ? 4 : 2);
  p->q = p->k = p->v = qkv;
  p->k.data = static_cast<const char*>(qkv.data) + bytes;
  p->v.data = static_cast<const char*>(qkv.data) + 2 * bytes;
  p->dq = slopes;
  p->dk = slopes ? static_cast<char*>(slopes) + bytes : nullptr;
  p->dv = slopes ? static_cast<char*>(slopes) + 2 * bytes : nullptr;
  p->q_stride = p->k_stride = p->v_stride = 3 * a.channels;
}

// What q, k and v are projected from.
struct Projection {
  fk_norm norm = {};
  std::vector<float> groups;
  fk_linear qkv = {}, to_input = {};
  Temporary rows, projected, slopes;
  fk_array input = absent();  // of the linear: normalised rows, or x itself
  bool apart = false;         // the norm is no part of the linear's step
};

// The projection again; its results' gradients are wanted or not.
void project(const Attention& a, const Windows& windows, const Tensor& x, const std::optional<Tensor>& statistics,
             bool wanted, Projection* to, fk_attention_backward* p) {
  const int64_t pixels = a.batch * a.tokens;
  to->input = view(x, "x");
  to->apart = a.norm == FK_GROUP_NORM || windows.padded();
  fk_norm norm = to->norm;
  if (to->apart) {
    set_group_statistics(&to->norm, group_statistics(to->norm, statistics, a.batch), to->input, a.batch, 0, a.tokens,
                         a.in_channels, &to->groups);
    to->rows = run_linear(to->input, to->norm, a.tokens, {}, pixels, a.in_channels, a.in_channels, a.low_precision);
    if (windows.padded()) to->rows = windows.gather(to->rows.array, a.in_channels);
    to->input = to->rows.array;
    norm = {};
  }
  to->projected =
      run_linear(to->input, norm, a.tokens, to->qkv, windows.rows(), 3 * a.channels, a.in_channels, a.low_precision);
  if (wanted) to->slopes = temporary(windows.rows(), 3 * a.channels, a.low_precision);
  set_packed(a, to->projected.array, wanted ? to->slopes.tensor.mutable_data_ptr() : nullptr, p);
}

void projection_gradients(const Attention& a, const Windows& windows, const TensorList& t, const Projection& from,
                          Gradients& found) {
  fk_linear_backward b = {};
  b.x = from.input;
  b.grad = from.slopes.array;
  b.to_input = from.to_input;
  b.low_precision = a.low_precision;
  b.rows = windows.rows();
  b.n = 3 * a.channels;
  b.k = a.in_channels;
  if (!from.apart) {
    b.norm = from.norm;
    b.dx = found.data(kX);
    return run_linear_backward(&b, found, {kQkv, kQkvBias, kNormWeight, kNormBias});
  }
  Memory memory;
  float* inputs = b.inputs = memory.take<float>(windows.rows() * a.in_channels);
  run_linear_backward(&b, found, {kQkv, kQkvBias});
  if (windows.padded()) {
    inputs = memory.take<float>(a.batch * a.tokens * a.in_channels);
    windows.scatter(b.inputs, 4 * a.in_channels, inputs);
  }
  norm_gradients(view(*t[kX], "x"), from.norm, t[kStatistics].has_value(), inputs, a.batch, a.tokens, a.in_channels,
                 {kX, kNormWeight, kNormBias, kStatistics}, &found);
}

std::vector<Tensor> backward(Grads grads, TensorList t, Needs needs, std::string norm, double norm_eps, int64_t height,
                             int64_t width, int64_t window, int64_t heads, double scale, std::string pad,
                             bool return_statistics, ScalarType dtype) {
  const Attention a = check(t, std::nullopt, norm, norm_eps, height, width, window, heads, pad, dtype);
  STD_TORCH_CHECK(!t[kStatistics].has_value() || a.norm == FK_GROUP_NORM, "norm_statistics: there is no GroupNorm");
  const ScalarType out_dtype = promoted(dtype, t[kResidual]);
  const auto given = take_results(grads, {a.batch, a.tokens, a.out}, out_dtype);
  fk_array grad = grad_view(grads, 0, 2, {a.batch, a.tokens, a.out}, out_dtype);
  view(t[kResidual], "residual", {a.batch, a.tokens, a.out});
  Gradients found(t, needs);
  Tensor of_result = grads[0];
  if (return_statistics) {
    const fk_array slopes = grad_view(grads, 1, 2, {a.batch, 2}, ScalarType::Float);
    of_result = with_statistics(grads[0], slopes, a.tokens, a.out, given, [&] {
      return run(t, std::nullopt, norm, norm_eps, height, width, window, heads, scale, pad, true, dtype);
    });
    grad = view(of_result, "grads");
  }
  found.copy(kResidual, of_result);

  Projection projection;
  fk_linear to_projection = {};
  const float* bias = nullptr;
  const int64_t bias_stride = a.area + kernels().panel;
  const Tensor block = pack_once([&](Packer& p) {
    projection.norm = norm_of(p, a.norm, a.norm_weight, a.norm_bias, a.norm_eps, a.in_channels);
    if (a.qkv.data) projection.qkv = p.linear(a.qkv, a.qkv_bias, 3 * a.channels, a.in_channels, a.low_precision);
    if (a.qkv.data) projection.to_input = p.transposed(a.qkv, a.in_channels, 3 * a.channels, a.low_precision);
    if (a.proj.data) to_projection = p.transposed(a.proj, a.value_channels, a.out, a.low_precision);
    if (a.bias.data) bias = p.table(a.bias, heads, a.area, a.area, bias_stride);
  });

  const Windows windows(a.batch, height, width, window);
  const std::vector<float> mask = pad == "mask" && windows.padded() ? windows.mask() : std::vector<float>();
  fk_attention_backward p = {};
  p.window_tokens = windows.tokens();
  p.tokens = a.tokens;
  p.sets_per_image = windows.sets_per_image();
  p.mask = mask.empty() ? nullptr : mask.data();
  p.sets = p.partials = a.batch * p.sets_per_image;
  if (found.wants(kBias)) p.partials = partial_count(p.sets, 4 * heads * a.area * a.area);
  p.bias_sums = found.table_sums(kBias, p.partials, heads, a.area, a.area);
  p.bias = bias;
  p.bias_stride = bias_stride;
  p.queries = p.keys = a.area;
  p.channels = a.channels;
  p.value_channels = a.value_channels;
  p.heads = heads;
  p.scale = static_cast<float>(scale);
  p.low_precision = a.low_precision;

  // q, k and v: three tensors, or side by side in one.
  Operand operands[3];
  bool wants_projection = false;
  if (a.qkv.data) {
    for (size_t i : {kX, kNormWeight, kNormBias, kStatistics, kQkv, kQkvBias}) wants_projection |= found.wants(i);
    project(a, windows, *t[kX], t[kStatistics], wants_projection, &projection, &p);
  } else if (t[kK].has_value()) {
    view(t[kK], "k", {a.batch, a.tokens, a.channels});
    view(t[kV], "v", {a.batch, a.tokens, a.value_channels});
    for (size_t i : {kX, kK, kV}) operands[i] = operand(windows, *t[i], i, found);
    p.q = operands[0].array;
    p.k = operands[1].array;
    p.v = operands[2].array;
    p.q_stride = p.k_stride = a.channels;
    p.v_stride = a.value_channels;
    p.dq = operands[0].slope;
    p.dk = operands[1].slope;
    p.dv = operands[2].slope;
  } else {
    operands[0] = operand(windows, *t[kX], kX, found);
    set_packed(a, operands[0].array, operands[0].slope, &p);
  }
  p.dq_dtype = p.q.dtype;
  p.dq_stride = p.q_stride;
  p.dk_stride = p.k_stride;
  p.dv_stride = p.v_stride;

  const int64_t pixels = a.batch * a.tokens;
  Temporary slopes, results;
  p.grad = grad;
  if (a.proj.data && (p.dq || p.dk || p.dv || p.bias_sums)) {
    slopes = linear_input_gradients(grad, to_projection, pixels, a.out, a.value_channels, a.low_precision, found);
    p.grad = slopes.array;
  }
  Temporary grads_of_windows;
  if (windows.padded()) {
    grads_of_windows = windows.gather(p.grad, a.value_channels);
    p.grad = grads_of_windows.array;
  }
  if (found.wants(kProj)) {
    results = temporary(windows.rows(), a.value_channels, a.low_precision);
    p.result = results.tensor.mutable_data_ptr();
  }
  const fk_table& k = kernels();
  if (p.dq || p.dk || p.dv || p.result || p.bias_sums)
    run_tasks(p.partials * heads, k.scratch_attention_backward(&p),
              [&](int64_t task, void* memory) { k.attention_backward(&p, task, memory); });
  for (const Operand& o : operands) finish(windows, o, found);
  if (found.wants(kProj) || found.wants(kProjBias)) {
    Temporary in_map = results;
    if (windows.padded() && found.wants(kProj)) {
      in_map = temporary(pixels, a.value_channels, a.low_precision);
      windows.scatter(p.result, a.value_channels * (a.low_precision ? 2 : 4), in_map.tensor.mutable_data_ptr());
    }
    linear_weight_gradients(in_map.array, grad, pixels, a.out, a.value_channels, a.low_precision, {kProj, kProjBias},
                            found);
  }
  if (wants_projection) projection_gradients(a, windows, t, projection, found);
  return found.finish();
}

}  // namespace
}  // namespace fk::local

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("local_attention_backward.native", TORCH_BOX(&fk::local::backward));
}
