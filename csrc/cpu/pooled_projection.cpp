#include "pooled_projection.h"

namespace fk::pooled {

Projection check(TensorList& t, const std::optional<Tensor>& packed, std::optional<double> in_norm_eps,
                 std::optional<double> norm_eps, int64_t height, int64_t width, int64_t kernel, bool ceil_mode,
                 ScalarType dtype) {
  check_count(t, kCount);
  const Tensor &x = required(t, kX, "x"), &weight = required(t, kWeight, "weight");
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x, weight: unexpected rank");
  check_grid(x.size(1), 0, height, width);
  STD_TORCH_CHECK(kernel > 0 && kernel <= kMostSize && (ceil_mode || kernel <= std::min(height, width)),
                  "kernel_size: does not go with the map");
  Projection e;
  e.batch = x.size(0);
  e.channels = x.size(2);
  e.out = weight.size(0);
  STD_TORCH_CHECK(e.channels > 0 && e.out > 0, "weight: expected at least one row and one column");
  e.low_precision = kernel_dtype(dtype) == FK_BF16 && kernels().low_precision;
  // Statistics are no weights: they change from call to call.
  const std::optional<Tensor> statistics = t[kStatistics];
  t[kStatistics].reset();
  auto look = [&] {
    e.in_norm_weight = weight_view(t[kInNormWeight], "in_norm_weight", {e.channels});
    e.in_norm_bias = weight_view(t[kInNormBias], "in_norm_bias", {e.channels});
    e.norm_weight = weight_view(t[kNormWeight], "norm_weight", {e.channels});
    e.norm_bias = weight_view(t[kNormBias], "norm_bias", {e.channels});
    e.weight = weight_view(t[kWeight], "weight", {e.out, e.channels});
    e.bias = weight_view(t[kBias], "bias", {e.out});
  };
  e.mark = identify({e.out, e.channels, e.low_precision, in_norm_eps.has_value(), norm_eps.has_value()}, t,
                    kInNormWeight, kCount, packed, look);
  t[kStatistics] = statistics;
  e.in_norm_eps = in_norm_eps;
  e.norm_eps = norm_eps;
  return e;
}

Tensor prepare(const Projection& e, const std::optional<Tensor>& packed, fk_pooled_projection* to, bool kept) {
  auto kind = [](std::optional<double> eps) { return eps.has_value() ? FK_GROUP_NORM : FK_NO_NORM; };
  return pack_call(
      packed, e.mark,
      [&](Packer& p) {
        to->in_norm =
            norm_of(p, kind(e.in_norm_eps), e.in_norm_weight, e.in_norm_bias, e.in_norm_eps.value_or(0.0), e.channels);
        to->norm = norm_of(p, kind(e.norm_eps), e.norm_weight, e.norm_bias, e.norm_eps.value_or(0.0), e.channels);
        to->linear = p.linear(e.weight, e.bias, e.out, e.channels, e.low_precision);
      },
      kept);
}

void set_geometry(const Projection& e, const Tensor& x, int64_t height, int64_t width, int64_t kernel, bool ceil_mode,
                  fk_pooled_projection* to) {
  to->x = view(x, "x");
  to->batch = e.batch;
  to->height = height;
  to->width = width;
  to->channels = e.channels;
  to->kernel = kernel;
  to->pooled_h = ceil_mode ? blocks(height, kernel) : height / kernel;
  to->pooled_w = ceil_mode ? blocks(width, kernel) : width / kernel;
}

Tensor pool(fk_pooled_projection* p, bool normalizes, std::vector<double>* statistics) {
  const int64_t rows = p->pooled_h * p->pooled_w;
  Tensor pooled = empty({p->batch, rows, p->channels}, ScalarType::Float);
  p->pooled = static_cast<float*>(pooled.mutable_data_ptr());
  // A task reads some 64 KB of the map: few enough pixels that threads end together.
  const int64_t area = std::min(p->kernel, p->height) * std::min(p->kernel, p->width) * p->channels;
  p->pixels_per_pool = rows_per_image_task(p->batch, rows, std::max<int64_t>(1, (1 << 14) / area));
  p->pools_per_image = blocks(rows, p->pixels_per_pool);
  Moments moments(normalizes ? p->batch : 0, p->pools_per_image);
  p->moments = normalizes ? moments.data() : nullptr;
  run_tasks(p->batch * p->pools_per_image, 0, [&](int64_t task, void*) { kernels().pool(p, task); });
  p->moments = nullptr;
  if (normalizes) *statistics = moments.finish(rows, p->channels);
  return pooled;
}

namespace {

Tensor run(TensorList t, std::optional<Tensor> packed, std::optional<double> in_norm_eps,
           std::optional<double> norm_eps, int64_t height, int64_t width, int64_t kernel, bool ceil_mode,
           ScalarType dtype) {
  const Projection e = check(t, packed, in_norm_eps, norm_eps, height, width, kernel, ceil_mode, dtype);
  struct Call {
    fk_pooled_projection p = {};
    const void* statistics = nullptr;
  };
  const auto call = std::make_shared<Call>();
  fk_pooled_projection& p = call->p;
  const Tensor block = prepare(e, packed, &p);
  set_geometry(e, *t[kX], height, width, kernel, ceil_mode, &p);
  const int64_t rows = p.pooled_h * p.pooled_w;
  Tensor out = empty({e.batch, rows, e.out}, dtype);
  p.out = out.mutable_data_ptr();
  p.out_dtype = kernel_dtype(dtype);
  call->statistics = group_statistics(p.in_norm, t[kStatistics], e.batch);

  const int64_t cached = kCacheBytes / (4 * e.channels);
  p.rows_per_task = std::min(rows, std::min<int64_t>(224, std::max<int64_t>(28, cached)));
  p.tasks_per_image = blocks(rows, p.rows_per_task);
  // Where an image has few pooled pixels, threads share them and take different columns of the weight.
  const int64_t threads = torch::stable::get_num_threads(), tasks = e.batch * p.tasks_per_image;
  const int64_t panels = blocks(e.out, kernels().panel);
  p.panel_groups = tasks >= 4 * threads ? 1 : std::max<int64_t>(1, std::min(panels, threads));
  perform(
      [call, block, tasks] {
        fk_pooled_projection& p = call->p;
        std::vector<float> in_groups, groups;
        set_group_statistics(&p.in_norm, call->statistics, p.x, p.batch, 0, p.height * p.width, p.channels, &in_groups);
        const bool normalizes = p.norm.kind == FK_GROUP_NORM;
        std::vector<double> statistics;
        const Tensor pooled = pool(&p, normalizes, &statistics);
        if (normalizes) set_group_statistics(&p.norm, statistics, &groups);
        const fk_table& k = kernels();
        run_tasks(tasks * p.panel_groups, k.scratch_pooled_projection(&p),
                  [&](int64_t task, void* memory) { k.pooled_projection(&p, task, memory); });
      },
      {&p.x.data, &p.out, &call->statistics}, {out});
  return out;
}

Tensor pack_only(TensorList t, std::optional<double> in_norm_eps, std::optional<double> norm_eps, int64_t height,
                 int64_t width, int64_t kernel, bool ceil_mode, ScalarType dtype) {
  fk_pooled_projection p = {};
  return prepare(check(t, std::nullopt, in_norm_eps, norm_eps, height, width, kernel, ceil_mode, dtype), std::nullopt,
                 &p, true);
}

}  // namespace
}  // namespace fk::pooled

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("pooled_projection", TORCH_BOX(&fk::pooled::run));
  m.impl("pooled_projection_pack", TORCH_BOX(&fk::pooled::pack_only));
}
