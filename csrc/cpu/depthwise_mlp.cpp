#include "depthwise_mlp.h"

#include <tuple>

namespace fk::mlp {
Mlp check(TensorList& t, const std::optional<Tensor>& packed, const Options& o) {
  check_count(t, kCount);
  const Tensor &x = required(t, kX, "x"), &expand = required(t, kExpand, "fc1_weight"),
               &filter = required(t, kFilter, "dw_weight"), &project = required(t, kProject, "fc2_weight");
  STD_TORCH_CHECK(x.dim() == 3 && expand.dim() == 2 && filter.dim() == 4 && project.dim() == 2,
                  "x, fc1_weight, dw_weight, fc2_weight: unexpected rank");
  STD_TORCH_CHECK(o.bn_eps.size() == 3, "bn_eps: expected one for each batch norm");
  Mlp m;
  m.batch = x.size(0);
  m.tokens = x.size(1);
  m.channels = x.size(2);
  m.hidden = expand.size(0);
  m.out = project.size(0);
  m.kernel = filter.size(3);
  check_grid(m.tokens, o.prefix, o.height, o.width);
  STD_TORCH_CHECK(m.kernel % 2 == 1, "dw_weight: expected an odd kernel");
  STD_TORCH_CHECK(m.channels > 0 && m.hidden > 0 && m.out > 0, "weights: expected at least one channel");
  STD_TORCH_CHECK(o.summary == "none" || o.summary == "statistics" || o.summary == "mean", "summary: unknown name");
  m.norm = norm_kind(o.norm);
  m.norm_eps = o.norm_eps;
  m.bn_after_activation = o.bn_after_activation;
  m.adds_input = o.inner_residual == "before_activation";
  m.out_norm_eps = o.out_norm_eps;
  m.low_precision = kernel_dtype(o.dtype) == FK_BF16 && kernels().low_precision;
  int64_t eps_bits[3] = {};
  for (int i = 0; i < 3; ++i) __builtin_memcpy(&eps_bits[i], &o.bn_eps[i], 8);
  // Statistics are no weights: they change from call to call.
  const std::optional<Tensor> statistics = std::move(t[kStatistics]);
  t[kStatistics].reset();
  auto look = [&] {
    m.norm_weight = weight_view(t[kNormWeight], "norm_weight", {m.channels});
    m.norm_bias = weight_view(t[kNormBias], "norm_bias", {m.channels});
    m.expand = weight_view(t[kExpand], "fc1_weight", {m.hidden, m.channels});
    m.expand_bias = weight_view(t[kExpandBias], "fc1_bias", {m.hidden});
    m.filter = weight_view(t[kFilter], "dw_weight", {m.hidden, 1, m.kernel, m.kernel});
    m.filter_bias = weight_view(t[kFilterBias], "dw_bias", {m.hidden});
    m.project = weight_view(t[kProject], "fc2_weight", {m.out, m.hidden});
    m.project_bias = weight_view(t[kProjectBias], "fc2_bias", {m.out});
    m.out_norm_weight = weight_view(t[kOutNormWeight], "out_norm_weight", {m.out});
    m.out_norm_bias = weight_view(t[kOutNormBias], "out_norm_bias", {m.out});
    m.bn[0] = batch_norm(t, kBn1, m.hidden, o.bn_eps[0]);
    m.bn[1] = batch_norm(t, kBn2, m.hidden, o.bn_eps[1]);
    m.bn[2] = batch_norm(t, kBn3, m.out, o.bn_eps[2]);
  };
  m.mark = identify({m.channels, m.hidden, m.out, m.kernel, m.low_precision, o.bn_after_activation, m.adds_input,
                     m.norm, o.out_norm_eps.has_value(), eps_bits[0], eps_bits[1], eps_bits[2]},
                    t, kNormWeight, kResidual, packed, look);
  t[kStatistics] = statistics;
  const std::string& inner = o.inner_residual;
  STD_TORCH_CHECK(inner == "none" || inner == "before_activation" || inner == "after_activation",
                  "inner_residual: unknown name");
  STD_TORCH_CHECK(!m.bn[1].present() || inner != "after_activation" || !m.bn_after_activation,
                  "inner_residual: the second batch norm stands between it and the activation");
  return m;
}

namespace {

// What is laid out: the kernel's weights, and the norm of the branch.
Tensor prepare(const Mlp& m, const std::optional<Tensor>& packed, fk_depthwise_mlp* to, fk_norm* out_norm,
               bool kept = false) {
  return pack_call(
      packed, m.mark,
      [&](Packer& p) {
        const int64_t panel = kernels().panel, padded = (m.hidden + panel - 1) / panel * panel;
        to->norm = norm_of(p, m.norm, m.norm_weight, m.norm_bias, m.norm_eps, m.channels);
        to->expand = p.folded(m.expand, m.expand_bias, m.hidden, m.channels, m.low_precision, BatchNorm{},
                              m.before_hidden_activation());
        const Affine affine = p.affine(m.after_hidden_activation(), m.hidden, padded);
        to->scale = affine.scale;
        to->shift = affine.shift;
        const Filter filter = p.depthwise(m.filter, m.filter_bias, m.before_activation(), m.hidden, m.kernel * m.kernel,
                                          padded, m.adds_input);
        to->filter = filter.taps;
        to->filter_bias = filter.shift;
        to->project =
            p.folded(m.project, m.project_bias, m.out, m.hidden, m.low_precision, m.after_activation(), m.bn[2]);
        *out_norm = norm_of(p, m.out_norm_eps.has_value() ? FK_GROUP_NORM : FK_NO_NORM, m.out_norm_weight,
                            m.out_norm_bias, m.out_norm_eps.value_or(0.0), m.out);
      },
      kept);
}

// Hidden channels that a task takes at a time: all of them, in equal parts.
int64_t even_chunk(int64_t hidden, int64_t panel, int64_t most) {
  const int64_t panels = blocks(hidden, panel);
  return blocks(panels, blocks(hidden, std::max(panel, most))) * panel;
}

// How many rows of the map make a task and how many hidden channels a chunk. A task's rows are expanded with their
// neighbours within the filter's reach, so few tall bands are best, as long as their data stays in L2; so are long
// chunks, because each is added to all sums.
void choose_tiles(fk_depthwise_mlp* p) {
  const int64_t reach = p->kernel / 2, panel = kernels().panel, size = p->expand.low_precision ? 2 : 4;
  // A cache line behind each row, so that power-of-two widths do not fall into one cache set.
  p->sums_stride = blocks(p->project.n, panel) * panel + 16;
  // Of an L2 cache of 1 MiB; found by measuring. The weights stream through the rest.
  constexpr int64_t kMost = 880 * 1024;
  const auto rows_with = [&](int64_t chunk) {
    const auto bytes = [&](int64_t rows) {
      const int64_t in = std::min(p->height, rows + 2 * reach) * p->width * p->channels * size;
      const int64_t map = (rows + 2 * reach) * (p->width + 2 * reach) * chunk * 4;
      return in + map + rows * p->width * (chunk * size + p->project.n * 4);
    };
    int64_t rows = p->height;
    while (rows > 1 && bytes(rows) > kMost) --rows;
    return rows;
  };
  // Bands of one small map would compute a good part of it twice, and two of seven rows are not even. All of this
  // depends on the sizes alone: chunks and slices change the order of a sum, and the number of threads must not.
  const int64_t pixels = p->height * p->width, hidden = p->expand.n;
  int64_t rows = rows_with(64);
  p->slices = p->batch == 1 && pixels <= 256 && hidden >= 256 && rows == p->height ? 2 : 1;
  // A longer chunk must not cut the map into more bands, except that the only map may always be two.
  const int64_t most_bands = std::max<int64_t>(blocks(p->height, rows), p->batch == 1 && p->slices == 1 ? 2 : 1);
  for (const int64_t most : {256, 128, 64}) {
    p->chunk = even_chunk(blocks(hidden, p->slices), panel, most);
    rows = rows_with(p->chunk);
    if (blocks(p->height, rows) <= most_bands) break;
  }
  p->rows_per_task = rows_per_image_task(p->batch * p->slices, p->height, rows);
  p->tasks_per_image = blocks(p->height, p->rows_per_task);
  p->pixels_per_sum = p->slices > 1 ? rows_per_image_task(p->batch, pixels, 64) : p->rows_per_task * p->width;
  p->sums_per_image = blocks(pixels, p->pixels_per_sum);
}

// A call as it is repeated, with memory of its own between its steps.
struct Call {
  fk_depthwise_mlp p = {};
  fk_norm out_norm = {};
  int64_t pixels = 0;
  bool wants_statistics = false, wants_mean = false;
  const void* statistics = nullptr;  // of the norm in front
  void* summary = nullptr;
  Tensor block, partial, raw;

  bool normed() const { return out_norm.kind == FK_GROUP_NORM; }
  void run();
  void write_mean(const std::vector<double>& means) const;
};

void Call::run() {
  const fk_table& k = kernels();
  std::vector<float> groups;
  set_group_statistics(&p.norm, statistics, p.x, p.batch, p.prefix, pixels, p.channels, &groups);
  const bool wants_moments = wants_statistics || normed();
  Moments moments(wants_moments ? p.batch : 0, p.sums_per_image);
  p.moments = wants_moments ? moments.data() : nullptr;
  std::vector<double> means(wants_mean ? static_cast<size_t>(p.batch * p.sums_per_image * p.project.n) : 0);
  p.means = wants_mean ? means.data() : nullptr;
  run_tasks(p.batch * p.tasks_per_image * p.slices, k.scratch_depthwise_mlp(&p),
            [&](int64_t task, void* memory) { k.depthwise_mlp(&p, task, memory); });
  if (p.slices > 1)
    run_tasks(p.batch * p.sums_per_image, 0, [&](int64_t task, void*) { k.depthwise_mlp_sum(&p, task); });
  if (wants_statistics && !normed()) moments.write(pixels, p.project.n, summary);
  std::vector<float> out_groups;
  if (normed()) set_group_statistics(&out_norm, moments.finish(pixels, p.project.n), &out_groups);
  if (wants_mean) write_mean(means);
  if (!normed()) return;

  const int64_t tasks_per_image = blocks(pixels, kMomentRows);
  Moments result(wants_statistics ? p.batch : 0, tasks_per_image);
  const fk_group_norm_rows g = {p.raw,
                                p.residual,
                                p.out,
                                p.out_dtype,
                                out_norm,
                                pixels,
                                p.prefix,
                                p.project.n,
                                kMomentRows,
                                tasks_per_image,
                                wants_statistics ? result.data() : nullptr};
  run_tasks(p.batch * tasks_per_image, 0, [&](int64_t task, void*) { k.group_norm_rows(&g, task); });
  if (wants_statistics) result.write(pixels, p.project.n, summary);
}

// Mean over the pixels of the branch, behind its norm if it has one, from the sums of the tasks.
void Call::write_mean(const std::vector<double>& means) const {
  const int64_t out = p.project.n;
  float* to = static_cast<float*>(summary);
  for (int64_t image = 0; image < p.batch; ++image)
    for (int64_t n = 0; n < out; ++n) {
      double mean = 0.0;
      for (int64_t sum = 0; sum < p.sums_per_image; ++sum) mean += means[(image * p.sums_per_image + sum) * out + n];
      mean /= static_cast<double>(pixels);
      if (normed())
        mean = (mean - out_norm.groups[2 * image]) * out_norm.groups[2 * image + 1] * out_norm.weight[n] +
               out_norm.bias[n];
      to[image * out + n] = static_cast<float>(mean);
    }
}

}  // namespace

Outputs forward(TensorList& t, const std::optional<Tensor>& packed, const Options& o,
                std::optional<ScalarType> wanted) {
  const Mlp m = check(t, packed, o);
  const auto call = std::make_shared<Call>();
  fk_depthwise_mlp& p = call->p;
  call->block = prepare(m, packed, &p, &call->out_norm);
  const ScalarType out_dtype = wanted.value_or(promoted(o.dtype, t[kResidual]));
  Tensor out = empty({m.batch, m.tokens, m.out}, out_dtype);
  p.x = view(*t[kX], "x");
  p.residual = view(t[kResidual], "residual", {m.batch, m.tokens, m.out});
  p.out = out.mutable_data_ptr();
  p.out_dtype = kernel_dtype(out_dtype);
  p.hidden_activation = activation_of(o.hidden_activation);
  p.activation = activation_of(o.activation);
  p.adds_hidden = o.inner_residual == "after_activation";
  p.batch = m.batch;
  p.height = o.height;
  p.width = o.width;
  p.channels = m.channels;
  p.prefix = o.prefix;
  p.kernel = m.kernel;
  choose_tiles(&p);
  const int64_t pixels = call->pixels = o.height * o.width;
  call->statistics = group_statistics(p.norm, t[kStatistics], m.batch);
  call->wants_statistics = o.summary == "statistics";
  call->wants_mean = o.summary == "mean";
  Tensor summary = call->wants_statistics ? empty({m.batch, 2}, ScalarType::Float)
                   : call->wants_mean     ? empty({m.batch, m.out}, ScalarType::Float)
                                          : no_statistics();
  if (call->wants_statistics || call->wants_mean) call->summary = summary.mutable_data_ptr();
  call->raw = call->normed() ? empty({m.batch, pixels, m.out}, ScalarType::Float) : no_statistics();
  p.raw = call->normed() ? static_cast<float*>(call->raw.mutable_data_ptr()) : nullptr;
  if (p.slices > 1) {
    call->partial = empty({p.slices, m.batch * pixels, p.sums_stride}, ScalarType::Float);
    p.partial = static_cast<float*>(call->partial.mutable_data_ptr());
  }
  perform([call] { call->run(); }, {&p.x.data, &p.residual.data, &p.out, &call->statistics, &call->summary},
          {out, summary});
  return {out, summary, call->raw};
}

namespace {

std::tuple<Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::string norm, double norm_eps,
                               std::string hidden_activation, std::string activation, std::string inner_residual,
                               bool bn_after_activation, std::vector<double> bn_eps, bool,
                               std::optional<double> out_norm_eps, int64_t height, int64_t width, int64_t prefix,
                               std::string summary, ScalarType dtype) {
  const Outputs found = forward(t, packed,
                                {norm, norm_eps, hidden_activation, activation, inner_residual, bn_after_activation,
                                 bn_eps, out_norm_eps, height, width, prefix, summary, dtype},
                                std::nullopt);
  return {found.out, found.summary};
}

// The same, and what the gradients would run the forward for: the branch in front of its own norm.
std::tuple<Tensor, Tensor, Tensor> run_keeping(TensorList t, std::string norm, double norm_eps,
                                               std::string hidden_activation, std::string activation,
                                               std::string inner_residual, bool bn_after_activation,
                                               std::vector<double> bn_eps, bool, std::optional<double> out_norm_eps,
                                               int64_t height, int64_t width, int64_t prefix, std::string summary,
                                               ScalarType dtype) {
  const Outputs found = forward(t, std::nullopt,
                                {norm, norm_eps, hidden_activation, activation, inner_residual, bn_after_activation,
                                 bn_eps, out_norm_eps, height, width, prefix, summary, dtype},
                                std::nullopt);
  return {found.out, found.summary, found.raw};
}

Tensor pack_only(TensorList t, std::string norm, double norm_eps, std::string hidden_activation, std::string activation,
                 std::string inner_residual, bool bn_after_activation, std::vector<double> bn_eps, bool,
                 std::optional<double> out_norm_eps, int64_t height, int64_t width, int64_t prefix, std::string summary,
                 ScalarType dtype) {
  fk_depthwise_mlp p = {};
  fk_norm out_norm;
  return prepare(check(t, std::nullopt,
                       {norm, norm_eps, hidden_activation, activation, inner_residual, bn_after_activation, bn_eps,
                        out_norm_eps, height, width, prefix, summary, dtype}),
                 std::nullopt, &p, &out_norm, true);
}

}  // namespace
}  // namespace fk::mlp

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("depthwise_mlp", TORCH_BOX(&fk::mlp::run));
  m.impl("depthwise_mlp_keeping", TORCH_BOX(&fk::mlp::run_keeping));
  m.impl("depthwise_mlp_pack", TORCH_BOX(&fk::mlp::pack_only));
}
