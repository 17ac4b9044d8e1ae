#include "depthwise_mlp_hidden.h"

namespace fk::mlp {

namespace {

// [taps][padded] twice, the second time turned by half a circle, and the bias.
void pack_filter(const Mlp& m, int64_t padded, Memory* memory, fk_depthwise_mlp_backward* p) {
  const int64_t taps = m.kernel * m.kernel;
  float* filter = memory->take<float>((2 * taps + 1) * padded);
  std::fill(filter, filter + (2 * taps + 1) * padded, 0.0f);
  float *flipped = filter + taps * padded, *bias = flipped + taps * padded;
  for (int64_t c = 0; c < m.hidden; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float weight = element(m.filter, c * taps + tap);
      filter[tap * padded + c] = weight;
      flipped[(taps - 1 - tap) * padded + c] = weight;
    }
    bias[c] = m.filter_bias.data ? element(m.filter_bias, c) : 0.0f;
  }
  p->filter = filter;
  p->flipped = flipped;
  p->filter_bias = bias;
}

}  // namespace

Tensor describe_hidden(const Mlp& m, const Options& o, const TensorList& t, Memory* memory, std::vector<float>* groups,
                       fk_depthwise_mlp_backward* p, bool kept) {
  p->x = view(*t[kX], "x");
  p->hidden_activation = activation_of(o.hidden_activation);
  p->activation = activation_of(o.activation);
  p->adds_input = m.adds_input;
  p->adds_hidden = o.inner_residual == "after_activation";
  p->norms_after_activation = m.bn_after_activation;
  p->batch = m.batch;
  p->height = o.height;
  p->width = o.width;
  p->channels = m.channels;
  p->out = m.out;
  p->prefix = o.prefix;
  p->kernel = m.kernel;
  const Tensor block = pack_once([&](Packer& packer) {
    p->norm = norm_of(packer, m.norm, m.norm_weight, m.norm_bias, m.norm_eps, m.channels);
    p->expand = kept ? fk_linear{nullptr, nullptr, m.hidden, m.channels, m.low_precision, nullptr}
                     : packer.linear(m.expand, m.expand_bias, m.hidden, m.channels, m.low_precision);
  });
  set_group_statistics(&p->norm, group_statistics(p->norm, t[kStatistics], m.batch), p->x, m.batch, o.prefix,
                       o.height * o.width, m.channels, groups);
  const int64_t panel = kernels().panel;
  pack_filter(m, blocks(m.hidden, panel) * panel, memory, p);
  return block;
}

// A multiple of every instruction set's vector.
constexpr int64_t kKeptPanel = 16;

std::vector<int64_t> kept_shape(const Mlp& m, int64_t pixels) {
  return {m.batch, blocks(m.hidden, kKeptPanel) * kKeptPanel, pixels};
}

void take_kept(const Mlp& m, const Options& o, const Tensor& kept, fk_depthwise_mlp_backward* p) {
  const std::vector<int64_t> shape = kept_shape(m, p->height * p->width);
  const fk_array array = view(kept, "kept", {shape[0], shape[1], shape[2]});
  STD_TORCH_CHECK(array.dtype == kernel_dtype(o.dtype), "kept: unexpected dtype");
  p->kept_dtype = array.dtype;
  p->kept = const_cast<void*>(array.data);
  p->kept_planes = shape[1] / kernels().lanes;
}

fk_array branch_view(const Tensor& branch, const Mlp& m, int64_t pixels) {
  const fk_array array = view(branch, "branch", {m.batch, pixels, m.out});
  STD_TORCH_CHECK(array.dtype == FK_F32, "branch: expected float32");
  return array;
}

// One by one: the allocator gives blocks of moderate size again that it was given back, larger ones are fresh pages.
std::vector<char*> take_stores(int64_t count, int64_t bytes, Memory* memory) {
  std::vector<char*> stores;
  for (int64_t i = 0; i < count; ++i) stores.push_back(memory->take<char>(bytes));
  return stores;
}

}  // namespace fk::mlp
