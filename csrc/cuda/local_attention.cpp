#include <tuple>

#include "support.h"

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

// Blocks that keep a GPU busy while each of them makes all heads of its window.
constexpr int64_t kManyBlocks = 256;

std::tuple<Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::string norm, double norm_eps,
                               int64_t height, int64_t width, int64_t window, int64_t heads, double scale,
                               std::string pad, bool return_statistics, ScalarType dtype) {
  check_count(t, kCount);
  STD_TORCH_CHECK(!packed.has_value(), "packed: the CUDA kernels read the weights themselves");
  const Tensor& x = required(t, kX, "x");
  check_tokens(x);
  STD_TORCH_CHECK(pad == "none" || pad == "mask" || pad == "zero", "pad: unknown name");
  STD_TORCH_CHECK(window > 0 && window <= 64, "window_size: expected 1 to 64");
  check_grid(x.size(1), 0, height, width);
  STD_TORCH_CHECK(pad != "none" || (height % window == 0 && width % window == 0),
                  "grid: expected multiples of the window");
  STD_TORCH_CHECK(t[kK].has_value() == t[kV].has_value(), "k, v: expected both or none");
  STD_TORCH_CHECK(!t[kK].has_value() || !t[kQkv].has_value(), "qkv_weight: expected none beside k and v");
  const int64_t batch = x.size(0), tokens = x.size(1);
  const bool makes = t[kQkv].has_value(), separate = t[kK].has_value();
  int64_t channels = x.size(2);
  if (makes) {
    STD_TORCH_CHECK(t[kQkv]->dim() == 2, "qkv_weight: expected [3 C, C_in]");
    channels = t[kQkv]->size(0);
  }
  if (!separate) {
    STD_TORCH_CHECK(channels % 3 == 0, "x, qkv_weight: expected 3 C channels");
    channels /= 3;
  }
  const int64_t value_channels = separate ? t[kV]->size(-1) : channels;
  STD_TORCH_CHECK(heads > 0 && channels > 0 && value_channels > 0 && channels % heads == 0 &&
                      value_channels % heads == 0 && value_channels / heads <= 128,
                  "num_heads: expected a divisor of the channels, and heads of at most 128");
  STD_TORCH_CHECK(!makes || window * window <= kTileRows, "qkv_weight: expected windows of at most 64 pixels with it");
  STD_TORCH_CHECK(makes || norm == "none", "norm: expected a qkv_weight behind it");

  LocalAttention p = {};
  Views views(x, dtype);
  const Stream stream(x);
  p.dtype = kernel_dtype(dtype);
  p.batch = static_cast<int32_t>(batch);
  p.height = static_cast<int32_t>(height);
  p.width = static_cast<int32_t>(width);
  p.window = static_cast<int32_t>(window);
  p.heads = static_cast<int32_t>(heads);
  p.head_width = static_cast<int32_t>(channels / heads);
  p.value_width = static_cast<int32_t>(value_channels / heads);
  p.scale = static_cast<float>(scale);
  p.masked = pad == "mask";
  std::optional<Tensor> statistics;
  if (makes) {
    p.x = views.array(x, "x", {batch, tokens, x.size(2)});
    p.qkv = views.linear(t[kQkv], t[kQkvBias], "qkv_weight", 3 * channels, x.size(2));
    p.norm.kind = norm_kind(norm);
    p.norm.eps = static_cast<float>(norm_eps);
    p.norm.weight = views.array(t[kNormWeight], "norm_weight", {x.size(2)});
    p.norm.bias = views.array(t[kNormBias], "norm_bias", {x.size(2)});
    if (p.norm.kind == kGroupNorm) {
      statistics = group_statistics(stream, t[kStatistics], x, 0);
      p.norm.statistics = static_cast<const float*>(statistics->const_data_ptr());
    }
  } else if (separate) {
    p.q = views.data(x, "x", {batch, tokens, channels});
    p.k = views.data(t[kK], "k", {batch, tokens, channels});
    p.v = views.data(t[kV], "v", {batch, tokens, value_channels});
    p.q_stride = p.k_stride = channels;
    p.v_stride = value_channels;
  } else {
    p.q = views.data(x, "x", {batch, tokens, 3 * channels});
    p.k = static_cast<const char*>(p.q) + channels * size_of(p.dtype);
    p.v = static_cast<const char*>(p.q) + 2 * channels * size_of(p.dtype);
    p.q_stride = p.k_stride = p.v_stride = 3 * channels;
  }
  p.bias = views.array(t[kBias], "attn_bias", {heads, window * window, window * window});
  int64_t out_channels = value_channels;
  if (t[kProj].has_value()) {
    STD_TORCH_CHECK(t[kProj]->dim() == 2 && t[kProj]->size(0) > 0, "proj_weight: expected [C_out, C_v]");
    out_channels = t[kProj]->size(0);
    p.projection = views.linear(t[kProj], t[kProjBias], "proj_weight", out_channels, value_channels);
  }
  p.residual = views.array(t[kResidual], "residual", {batch, tokens, out_channels});
  p.vectors = views.vectors({p.head_width, p.value_width});
  p.weight_vectors = views.vectors({makes ? x.size(2) : 0, p.projection.weight ? value_channels : 0});
  const ScalarType out_dtype = promoted(dtype, t[kResidual]);
  p.out_dtype = kernel_dtype(out_dtype);
  const Tensor out = empty(x, {batch, tokens, out_channels}, out_dtype);
  p.out = out.mutable_data_ptr();

  // The projection needs all heads of a row. Without it heads can go to blocks of their own, which make x anew.
  p.heads_per_block = p.heads;
  if (!p.projection.weight && (!makes || batch * blocks_per_sample(p) < kManyBlocks)) p.heads_per_block = 1;
  check_shared_memory(shared_bytes(p));
  Tensor moments = empty(x, {return_statistics ? batch : 0, blocks_per_sample(p), 3}, ScalarType::Float);
  if (return_statistics) p.moments = static_cast<float*>(moments.mutable_data_ptr());
  stream.run(p);
  return {out, return_statistics ? merged_statistics(stream, moments, batch) : empty(x, {0}, ScalarType::Float)};
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(FK_LIBRARY, FK_DISPATCH_KEY, m) { m.impl("local_attention", TORCH_BOX(&fk::run)); }
