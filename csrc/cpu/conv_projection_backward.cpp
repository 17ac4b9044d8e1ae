#include <cmath>
#include <cstring>

#include "channel_norm.h"
#include "conv_projection.h"
#include "gradients.h"

namespace fk::projection {
namespace {

// Bands of rows that a call is cut into at least, where it can be.
constexpr int64_t kTasks = 8;
constexpr int64_t kBandBytes = 256 * 1024;

enum Field { kFilter, kBnWeight, kBnBias, kBnMean, kBnVar, kWeight, kBias };
size_t index_of(int branch, Field field) { return kFirstBranch + branch * kPerBranch + field; }

// Rows of a band: as many as `most`, yet enough bands.
int64_t band_rows(int64_t batch, int64_t height, int64_t most) {
  const int64_t bands =
      std::max(blocks(height, std::max<int64_t>(1, most)), blocks(kTasks, std::max<int64_t>(1, batch)));
  return blocks(height, std::min(height, bands));
}

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

// Where the gradients of the convolutions' results go, zeros for now.
std::vector<Tensor> bordered_maps(Backward* b) {
  std::vector<Tensor> maps;
  for (int i = 0; b->wants_input && i < kBranches; ++i) {
    const fk_conv_branch& f = b->c.forward.branch[i];
    fk_conv_branch_backward& to = b->c.branch[i];
    // The first and the last results that a pixel of the map asks for, whether or not they exist.
    to.border = blocks(std::max<int64_t>(0, f.kernel - 1 - f.padding), f.stride);
    to.slope_h = to.border + std::max(f.out_h, (b->o.height - 1 + f.padding) / f.stride + 1);
    to.slope_w = to.border + std::max(f.out_w, (b->o.width - 1 + f.padding) / f.stride + 1);
    const int64_t image = to.slope_h * to.slope_w * padded_channels(b->p.channels) * (b->p.low_precision ? 2 : 4);
    maps.push_back(empty({b->p.batch * image}, ScalarType::Byte));
    char* slopes = static_cast<char*>(maps.back().mutable_data_ptr());
    run_tasks(b->p.batch, 0, [&](int64_t n, void*) { std::memset(slopes + n * image, 0, static_cast<size_t>(image)); });
    to.slopes = slopes;
  }
  return maps;
}

// Sums over all pixels, per branch [kinds][padded channels].
class Sums {
 public:
  Sums(const Backward& b) : kinds_(b.c.kinds), padded_(padded_channels(b.p.channels)), channels_(b.p.channels) {}

  double* partials(int64_t count, Memory* memory) {
    count_ = count;
    return partials_ = memory->take<double>(std::max<int64_t>(1, count * kBranches * kinds_ * padded_));
  }
  // Added over the partial sums, in order.
  std::vector<double> of(int branch, int64_t kind) const {
    std::vector<double> sums(static_cast<size_t>(channels_), 0.0);
    for (int64_t i = 0; i < count_; ++i) {
      const double* from = partials_ + ((i * kBranches + branch) * kinds_ + kind) * padded_;
      for (int64_t c = 0; c < channels_; ++c) sums[c] += from[c];
    }
    return sums;
  }

 private:
  int64_t kinds_, padded_, channels_, count_ = 0;
  double* partials_ = nullptr;
};

// The batch norm's own gradients, from the sums of the gradient behind it, alone and times the normalised value.
void norm_gradients(Backward* b, int i, const std::vector<double>& alone, const std::vector<double>& times) {
  const BatchNorm& bn = b->p.branch[i].bn;
  b->found.set(index_of(i, kBnWeight), times);
  b->found.set(index_of(i, kBnBias), alone);
  // Statistics of the batch itself are made again by whoever differentiates: those given are not read.
  std::vector<double> mean(alone.size(), 0.0), variance(alone.size(), 0.0);
  for (size_t c = 0; !b->training && c < alone.size(); ++c) {
    const double scale = bn.scale(static_cast<int64_t>(c));
    mean[c] = -scale * alone[c];
    variance[c] = -0.5 * scale * times[c] / std::sqrt(element(bn.var, static_cast<int64_t>(c)) + bn.eps);
  }
  b->found.set(index_of(i, kBnMean), mean);
  b->found.set(index_of(i, kBnVar), variance);
}

void filter_gradients(Backward* b, int i, const Sums& sums) {
  if (!b->c.branch[i].wants_filter) return;
  const int64_t taps = b->p.branch[i].kernel * b->p.branch[i].kernel;
  std::vector<double> values(static_cast<size_t>(b->p.channels * taps));
  for (int64_t tap = 0; tap < taps; ++tap) {
    const std::vector<double> of_tap = sums.of(i, FK_CONV_TAPS + tap);
    for (int64_t c = 0; c < b->p.channels; ++c) values[c * taps + tap] = of_tap[c];
  }
  b->found.set(index_of(i, kFilter), values);
}

// Through the batch norms and the convolutions, as far as their results: sums of the former where they are those of the
// batch, then the rest.
void convolution_gradients(Backward* b) {
  fk_conv_projection_backward& c = b->c;
  c.kinds = 0;
  for (int i = 0; i < kBranches; ++i) {
    c.kinds = std::max(c.kinds, FK_CONV_TAPS + c.forward.branch[i].kernel * c.forward.branch[i].kernel);
    c.branch[i].wants_filter = b->wants(i, {kFilter});
    c.branch[i].norm = b->norms[i].vectors;
  }
  Sums sums(*b);
  const int64_t bytes = kBranches * c.kinds * padded_channels(b->p.channels) * static_cast<int64_t>(sizeof(double));
  c.partials = partial_count(b->p.batch * c.forward.tasks_per_image, bytes);
  c.sums = sums.partials(c.partials, &b->memory);
  const fk_table& k = kernels();
  auto run = [&](bool finish) {
    run_tasks(c.partials, k.scratch_conv_projection(&c.forward),
              [&](int64_t partial, void* memory) { k.conv_projection_backward(&c, partial, finish, memory); });
  };
  auto of_norms = [&] {
    for (int i = 0; i < kBranches; ++i) {
      if (!b->p.branch[i].bn.present() || !b->passes(i)) continue;
      const std::vector<double> alone = sums.of(i, FK_CONV_GRADS), times = sums.of(i, FK_CONV_GRADS_X);
      norm_gradients(b, i, alone, times);
      const double count = static_cast<double>(b->p.batch * b->pixels(i));
      if (b->training) b->norms[i].set_gradients(alone, times, sums.of(i, FK_CONV_X), count);
    }
  };
  if (b->training) {
    run(false);
    of_norms();
  }
  run(true);
  if (!b->training) of_norms();
  for (int i = 0; i < kBranches; ++i) filter_gradients(b, i, sums);
}

void input_gradients(Backward* b) {
  fk_conv_projection_backward& c = b->c;
  const int64_t row = 4 * padded_channels(b->p.channels) * b->o.width;
  c.rows_per_band = band_rows(b->p.batch, b->o.height, kBandBytes / std::max<int64_t>(1, row));
  c.bands = blocks(b->o.height, c.rows_per_band);
  c.dx = b->found.data(0);
  c.affine = b->found.affine_sums(1, 2, b->p.batch * c.bands, b->p.channels);
  const fk_table& k = kernels();
  run_tasks(b->p.batch * c.bands, k.scratch_conv_projection_input(&c),
            [&](int64_t task, void* memory) { k.conv_projection_input(&c, task, memory); });
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
  b.c.low_precision = p.low_precision;
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
  if (passes) {
    const std::vector<Tensor> maps = bordered_maps(&b);
    convolution_gradients(&b);
    if (b.wants_input) input_gradients(&b);
  }
  return found.finish();
}

}  // namespace
}  // namespace fk::projection

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("conv_projection_backward.native", TORCH_BOX(&fk::projection::run));
}
