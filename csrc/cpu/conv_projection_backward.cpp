#include "conv_gradients.h"
#include "conv_projection.h"

namespace fk::projection {
namespace {

enum Field { kFilter, kBnWeight, kBnBias, kBnMean, kBnVar, kWeight, kBias };
size_t index_of(int branch, Field field) { return kFirstBranch + branch * kPerBranch + field; }

struct Backward {
  const Projection& p;
  const Options& o;
  bool training;
  Gradients& found;
  Memory memory;
  bool wants_input;
  std::vector<ChannelNorm> norms;
  fk_conv_projection_backward c = {};

  int64_t pixels(int i) const { return c.forward.branch[i].out_h * c.forward.branch[i].out_w; }
  int64_t rows(int i) const { return p.batch * (o.prefix + pixels(i)); }
  bool wants(int i, std::initializer_list<Field> fields) const {
    for (Field field : fields)
      if (found.wants(index_of(i, field))) return true;
    return false;
  }
  // Whether anything in front of the linear is wanted.
  bool passes(int i) const { return wants_input || wants(i, {kFilter, kBnWeight, kBnBias, kBnMean, kBnVar}); }
};

// What the linears with wanted weights read, of the products' type.
std::vector<Temporary> linear_inputs(const Backward& b) {
  fk_conv_projection c = b.c.forward;
  const Tensor block = pack_once([&](Packer& packer) {
    for (int i = 0; i < kBranches; ++i) describe_filter(packer, b.p, i, true, &c.branch[i]);
  });
  std::vector<Temporary> inputs;
  bool any = false;
  for (int i = 0; i < kBranches; ++i) {
    const bool wanted = b.found.wants(index_of(i, kWeight));
    inputs.push_back(temporary(wanted ? b.rows(i) : 0, b.p.channels, b.p.low_precision));
    c.branch[i].out = wanted ? inputs[i].tensor.mutable_data_ptr() : nullptr;
    c.branch[i].linear.low_precision = b.p.low_precision;
    any |= wanted;
  }
  const fk_table& k = kernels();
  if (any)
    run_tasks(b.p.batch * c.tasks_per_image, k.scratch_conv_projection(&c),
              [&](int64_t task, void* memory) { k.conv_projection(&c, task, memory); });
  return inputs;
}

// Gradients of the linears' weights, and of what they read.
std::vector<Temporary> linear_gradients(Backward* b, const fk_array* grads) {
  const std::vector<Temporary> inputs = linear_inputs(*b);
  fk_linear to_input[kBranches] = {};
  const Tensor block = pack_once([&](Packer& packer) {
    for (int i = 0; i < kBranches; ++i)
      if (b->passes(i))
        to_input[i] = packer.transposed(b->p.branch[i].weight, b->p.channels, b->p.branch[i].out, b->p.low_precision);
  });
  std::vector<Temporary> slopes;
  for (int i = 0; i < kBranches; ++i) {
    slopes.push_back(temporary(b->passes(i) ? b->rows(i) : 0, b->p.channels, b->p.low_precision));
    fk_linear_backward l = {};
    l.x = inputs[i].array;
    l.grad = grads[i];
    l.to_input = to_input[i];
    l.low_precision = b->p.low_precision;
    l.rows = b->rows(i);
    l.n = b->p.branch[i].out;
    l.k = b->p.channels;
    l.dx = b->passes(i) ? slopes[i].tensor.mutable_data_ptr() : nullptr;
    b->c.branch[i].grad = l.dx;
    run_linear_backward(&l, b->found, {index_of(i, kWeight), index_of(i, kBias)});
  }
  return slopes;
}

// Through the batch norms and the convolutions, as far as their results: sums of the former where they are those of the
// batch, then the rest.
void convolution_gradients(Backward* b) {
  fk_conv_projection_backward& c = b->c;
  for (int i = 0; i < kBranches; ++i) {
    c.branch[i].wants_filter = b->wants(i, {kFilter});
    c.branch[i].norm = b->norms[i].vectors;
  }
  const ConvSums sums(&c, &b->memory);
  auto of_norms = [&] {
    for (int i = 0; i < kBranches; ++i) {
      const BatchNorm& bn = b->p.branch[i].bn;
      if (!bn.present() || !b->passes(i)) continue;
      const std::vector<double> alone = sums.of(i, FK_CONV_GRADS), times = sums.of(i, FK_CONV_GRADS_X);
      batch_norm_gradients(bn, b->training, alone, times, index_of(i, kBnWeight), &b->found);
      if (!b->training) continue;
      const double count = static_cast<double>(b->p.batch * b->pixels(i));
      b->norms[i].set_gradients(alone, times, sums.of(i, FK_CONV_X), count);
    }
  };
  if (b->training) {
    sums.run(false);
    of_norms();
  }
  sums.run(true);
  if (!b->training) of_norms();
  for (int i = 0; i < kBranches; ++i)
    if (c.branch[i].wants_filter) b->found.set(index_of(i, kFilter), sums.of_filter(i));
}

std::vector<Tensor> run(Grads grads, TensorList t, Needs needs, std::optional<double> norm_eps,
                        std::vector<double> bn_eps, bool training, int64_t height, int64_t width, int64_t prefix,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, ScalarType dtype) {
  const Options o = {norm_eps, bn_eps, height, width, prefix, stride, padding, dtype};
  const Projection p = check(t, std::nullopt, o);
  Gradients found(t, needs);
  Backward b = {p, o, training, found, {}, found.wants(0) || found.wants(1) || found.wants(2), {}, {}};
  set_geometry(p, o, *t[0], &b.c.forward);
  b.c.forward.rows_per_task = band_rows(p.batch, height, cached_rows(p, width));
  b.c.forward.tasks_per_image = blocks(height, b.c.forward.rows_per_task);
  b.c.dtype = p.low_precision ? FK_BF16 : FK_F32;
  b.c.training = training;
  fk_array of_outputs[kBranches];
  bool passes = false;
  for (int i = 0; i < kBranches; ++i) {
    of_outputs[i] = grad_view(grads, i, kBranches, {p.batch, prefix + b.pixels(i), p.branch[i].out}, dtype);
    b.norms.emplace_back(p.branch[i].bn, p.channels, padded_channels(p.channels), training, &b.memory);
    passes |= b.passes(i);
  }
  const Tensor block = pack_once([&](Packer& packer) {
    b.c.forward.norm = norm_of(packer, p.norm_weight, p.norm_bias, p.norm_eps, p.channels);
    for (int i = 0; i < kBranches; ++i) describe_filter(packer, p, i, false, &b.c.forward.branch[i]);
  });
  const std::vector<Temporary> slopes = linear_gradients(&b, of_outputs);
  if (!passes) return found.finish();
  std::vector<Tensor> maps;
  for (int i = 0; i < kBranches && b.wants_input; ++i) maps.push_back(bordered_map(&b.c, i));
  convolution_gradients(&b);
  if (b.wants_input) map_gradients(&b.c, 0, 1, 2, &found);
  return found.finish();
}

}  // namespace
}  // namespace fk::projection

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("conv_projection_backward.native", TORCH_BOX(&fk::projection::run));
}
