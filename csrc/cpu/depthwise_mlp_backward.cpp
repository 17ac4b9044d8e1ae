#include <cmath>

#include "depthwise_mlp_hidden.h"
#include "statistics_gradients.h"

namespace fk::mlp {
namespace {

using Needs = std::vector<bool>;

// Tasks that a call is cut into at least, where it can be, the same in steps, groups of images at most, and pixels that
// products need.
constexpr int64_t kTasks = 8, kStepTasks = 4, kMostGroups = 32, kFewPixels = 400;

// So few pixels that a chunk's maps of all images fit in L2, and chunks that may then be tasks: at so many times as
// many hidden channels as pixels partial sums of the weights' gradients cost more than partial gradients of the input.
constexpr int64_t kPixelsOfTask = 512, kMostChunks = 16, kManyChannels = 4;

// Of the kernels' memory.
constexpr int64_t kAlignment = 64;

// Sums over all pixels.
struct Sums {
  std::vector<double> channels;    // [FK_SUM_TAPS + taps][padded hidden]
  const float* project = nullptr;  // [padded hidden][padded N]: of the second linear's weight, where a norm needs it
};

struct Backward {
  TensorList& t;
  const Options& o;
  const Needs& needs;
  bool training;
  Mlp m;
  Memory memory;
  std::vector<Tensor> found;  // by index; only those needed are set
  int64_t pixels, panel, hidden, taps;
  fk_array own;  // the gradient of the result, where x's takes it: see Gradients

  bool needs_any(std::initializer_list<size_t> indices) const {
    for (size_t i : indices)
      if (needs[i]) return true;
    return false;
  }
  bool of_batch(int norm) const { return training && m.bn[norm].present(); }
};

constexpr int64_t kRowsPerTask = 64;
// `body` for each of so many rows.
template <class Body>
void for_rows(int64_t rows, const Body& body) {
  run_tasks(blocks(rows, kRowsPerTask), 0, [&](int64_t task, void*) {
    for (int64_t row = task * kRowsPerTask; row < std::min(rows, (task + 1) * kRowsPerTask); ++row) body(row);
  });
}

// The gradient of the result without prefix rows in fp32, with what comes by way of the summary: means over the pixels,
// or mean and variance of the image, which `results` brings.
float* gather(Backward* b, const fk_array& grad, const fk_array& summary,
              const std::optional<std::tuple<Tensor, Tensor>>& results) {
  const Mlp& m = b->m;
  const int64_t width = m.out, rows = b->pixels;
  float* map = b->memory.take<float>(m.batch * rows * width);
  const fk_array out = results ? view(std::get<0>(*results), "out") : absent();
  const fk_array statistics = results ? view(std::get<1>(*results), "summary") : absent();
  if (results && b->o.prefix == 0) {
    fk_statistics_backward p = {};
    p.grad = grad;
    p.out = out;
    p.statistics = static_cast<const float*>(statistics.data);
    p.slopes = static_cast<const float*>(summary.data);
    p.images = m.batch;
    p.rows = rows;
    p.columns = width;
    p.rows_per_task = kRowsPerTask;
    p.to = map;
    run_tasks(blocks(m.batch * rows, kRowsPerTask), 0,
              [&](int64_t task, void*) { kernels().statistics_backward(&p, task); });
    return map;
  }
  const double n = static_cast<double>(rows * width);
  std::vector<float> of_means(static_cast<size_t>(summary.data && !results ? m.batch * width : 0));
  for (size_t i = 0; i < of_means.size(); ++i)
    of_means[i] = element(summary, static_cast<int64_t>(i)) / static_cast<float>(rows);
  for_rows(m.batch * rows, [&](int64_t row) {
    const int64_t image = row / rows, at = (image * m.tokens + b->o.prefix + row % rows) * width;
    float* to = map + row * width;
    read_values(grad, at, width, to);
    if (!of_means.empty()) {
      const float* more = of_means.data() + image * width;
      for (int64_t c = 0; c < width; ++c) to[c] += more[c];
    }
    if (!results || !summary.data) return;
    const float mean = element(statistics, 2 * image);
    const float base = static_cast<float>(element(summary, 2 * image) / n);
    const float slope = static_cast<float>(2.0 * element(summary, 2 * image + 1) / n);
    std::vector<float> values(static_cast<size_t>(width));
    read_values(out, at, width, values.data());
    for (int64_t c = 0; c < width; ++c) to[c] += base + slope * (values[c] - mean);
  });
  return map;
}

// The residual's gradient: that of the result, prefix rows included.
void residual_gradient(Backward* b, const fk_array& grad, const float* map) {
  const Mlp& m = b->m;
  Tensor& out = b->found[kResidual] = gradient_of(*b->t[kResidual]);
  const Writer writer(out);
  const int64_t width = m.out, prefix = b->o.prefix;
  for_rows(m.batch * m.tokens, [&](int64_t row) {
    const int64_t image = row / m.tokens, token = row % m.tokens, at = row * width;
    if (map && token >= prefix) return writer.set(at, map + (image * b->pixels + token - prefix) * width, width);
    std::vector<float> values(static_cast<size_t>(width));
    read_values(grad, at, width, values.data());
    writer.set(at, values.data(), width);
  });
}

void write_vector(Backward* b, size_t index, const std::vector<double>& values) {
  if (!b->needs[index]) return;
  b->found[index] = gradient_of(*b->t[index]);
  const Writer writer(b->found[index]);
  const int64_t n = b->found[index].numel();
  for (int64_t i = 0; i < n; ++i) writer.set(i, static_cast<float>(values[i]));
}

// Backward of a batch norm behind the second linear that takes its statistics from the batch: `grad` [rows][N] becomes
// the gradient of its input `raw` [images, skipped + rows, N].
void batch_norm_gradients(Backward* b, float* grad, const fk_array& raw, int64_t skipped) {
  const Mlp& m = b->m;
  const fk_table& k = kernels();
  const int64_t width = m.out, padded = blocks(width, b->panel) * b->panel;
  const float* x = static_cast<const float*>(raw.data);
  // Those of `raw` itself, not rounded as the given ones are: a constant gradient must leave nothing.
  std::vector<double> moments(static_cast<size_t>(m.batch * 2 * width));
  const fk_channel_moments of_images = {x, b->pixels, skipped, width, moments.data()};
  run_tasks(m.batch, 0, [&](int64_t image, void*) { k.channel_moments(&of_images, image); });
  ChannelNorm norm(m.bn[2], width, padded, true, &b->memory);
  float* mean_rest = b->memory.take<float>(padded);
  std::fill(mean_rest, mean_rest + padded, 0.0f);
  for (int64_t c = 0; c < width; ++c) {
    const Merged found = merge(
        m.batch, b->pixels, [&](int64_t image) { return moments[image * 2 * width + c]; },
        [&](int64_t image) { return moments[(image * 2 + 1) * width + c]; });
    norm.set_statistics(c, found.mean, found.variance);
    mean_rest[c] = static_cast<float>(found.mean - norm.mean[c]);
  }
  const int64_t tasks_per_image = blocks(b->pixels, kRowsPerTask), tasks = m.batch * tasks_per_image;
  std::vector<double> partial(static_cast<size_t>(tasks * 2 * width));
  const fk_batch_norm_backward p = {x,       grad,  norm.vectors, mean_rest,       b->pixels,
                                    skipped, width, kRowsPerTask, tasks_per_image, partial.data()};
  run_tasks(tasks, 0, [&](int64_t task, void*) { k.batch_norm_backward(&p, 0, task); });
  std::vector<double> alone(width, 0.0), times(width, 0.0);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t c = 0; c < width; ++c) {
      alone[c] += partial[task * 2 * width + c];
      times[c] += partial[(task * 2 + 1) * width + c];
    }
  write_vector(b, kBn3, times);
  write_vector(b, kBn3 + 1, alone);
  const double n = static_cast<double>(m.batch * b->pixels);
  for (int64_t c = 0; c < width; ++c) {
    norm.grad_mean[c] = static_cast<float>(alone[c] / n);
    norm.grad_slope[c] = static_cast<float>(times[c] / n);
  }
  run_tasks(tasks, 0, [&](int64_t task, void*) { k.batch_norm_backward(&p, 1, task); });
}

// Whether a task may do all steps of a chunk of hidden channels: nobody waits for anybody between them.
bool chunks_are_tasks(const fk_depthwise_mlp_backward& p, int64_t hidden) {
  const int64_t pixels = p.batch * p.height * p.width, chunks = blocks(hidden, kHiddenChunkInParts);
  return pixels > 0 && pixels <= kPixelsOfTask && hidden >= kManyChannels * pixels && chunks > 1 &&
         chunks <= kMostChunks;
}

// How a call is cut: hidden channels at a time, rows at a time, images and hidden channels that share partial sums.
void choose_tiles(fk_depthwise_mlp_backward* p, int64_t hidden) {
  const int64_t panel = kernels().panel, reach = p->kernel / 2;
  if (p->chunk_maps) {
    p->stack = p->batch;
    p->chunk = kHiddenChunkInParts;
    p->rows_per_band = (p->batch * p->height + 1) / 2 * 2;
    p->groups = 1;
    p->slices = blocks(hidden, p->chunk);
    return;
  }
  // Steps have no slices: their stacks are all the tasks there are.
  const int64_t most = p->stores ? blocks(p->batch, kStepTasks) : p->batch;
  p->stack = std::max<int64_t>(1, std::min(most, kFewPixels / (p->height * p->width)));
  const int64_t stacks = blocks(p->batch, p->stack), rows = p->stack * p->height;
  const int64_t padded = (p->stack * (p->height + reach) + reach) * (p->width + 2 * reach);
  const bool steps = p->stores;
  // Between steps the maps wait in the cache.
  const bool wide = p->project_back.parts && (!steps || padded * kHiddenChunkInParts * 4 <= 512 * 1024);
  p->chunk = std::max(panel, wide ? kHiddenChunkInParts : kHiddenChunk);
  while (!steps && p->chunk < 256 && padded * p->chunk * 2 * 4 <= 128 * 1024) p->chunk *= 2;
  p->chunk = std::min(p->chunk, hidden);
  // The arrays of a band and of what it reads, in an L2 cache.
  const int64_t row_bytes = p->width * p->chunk * 4 * 7;
  p->rows_per_band = std::max<int64_t>(2, 640 * 1024 / row_bytes / 2 * 2);
  const int64_t bands = blocks(rows, p->rows_per_band);
  p->rows_per_band = (blocks(rows, bands) + 1) / 2 * 2;
  // Tasks are groups of stacks, each with its own partial sums of the weights' gradients, times slices of the hidden
  // channels, each with its own partial gradient of the input: as many as threads need, with as little of both as
  // possible. Slices prepare the images once more, so they count for more.
  const int64_t channels = blocks(p->channels, panel) * panel, out = blocks(p->out, panel) * panel;
  const int64_t weights = (steps ? p->chunk : hidden) * (channels + out);
  const int64_t inputs = 3 * p->batch * p->height * p->width * channels;
  const int64_t chunks = steps ? 1 : blocks(hidden, p->chunk);
  p->groups = 0;
  p->slices = 1;
  int64_t best = 0, least = 0;
  for (int64_t wanted = 1; wanted <= std::min(stacks, kMostGroups); wanted *= 2) {
    const int64_t groups = blocks(stacks, blocks(stacks, wanted));
    const int64_t slices = blocks(chunks, blocks(chunks, std::min(chunks, blocks(kTasks, groups))));
    const int64_t tasks = std::min(kTasks, groups * slices), values = groups * weights + slices * inputs;
    if (tasks < best || (tasks == best && values >= least)) continue;
    best = tasks;
    least = values;
    p->groups = groups;
    p->slices = slices;
  }
}

// The gradients of both linears' weights from the partial sums that there are, those of `rows` hidden channels.
// `scale`: of the second one's, per column, or null.
// `run(tasks, task)` does the tasks.
template <class Run>
void write_weights(Backward* b, const fk_depthwise_mlp_backward& p, int64_t rows, const float* scale, const Run& run) {
  const Mlp& m = b->m;
  const int64_t channels = blocks(m.channels, b->panel) * b->panel, out = blocks(m.out, b->panel) * b->panel;
  const int64_t present = std::min(rows, m.hidden - p.first), groups = std::max<int64_t>(1, p.groups);
  if (present <= 0) return;
  // `first`: the element of the gradient that belongs to the first of the rows.
  const auto sums = [&](size_t index, const float* partials, int64_t columns, int64_t width, int64_t first) {
    fk_weight_sums s = {};
    if (!b->needs[index]) return s;
    Tensor& to = b->found[index];
    s.out_dtype = kernel_dtype(to.scalar_type());
    s.out = static_cast<char*>(to.mutable_data_ptr()) + first * (s.out_dtype == FK_F32 ? 4 : 2);
    s.partials = partials;
    s.count = groups;
    s.stride = p.rows * columns;
    s.rows = present;
    s.columns = columns;
    s.width = width;
    return s;
  };
  fk_weight_sums expand = sums(kExpand, p.expand_sums, channels, m.channels, p.first * m.channels);
  expand.out_stride = m.channels;
  fk_weight_sums project = sums(kProject, p.project_sums, out, m.out, p.first);
  project.out_stride = m.hidden;
  project.turned = true;
  project.scale = scale;
  const int64_t first = expand.out ? blocks(present, FK_WEIGHT_TASK) : 0;
  run(first + (project.out ? blocks(m.out, FK_WEIGHT_TASK) : 0), [&](int64_t task, void*) {
    kernels().add_weight_sums(task < first ? &expand : &project, task < first ? task : task - first);
  });
}

// The hidden part: sums for all weights around the hidden map, the gradients of both linears' weights, and that of the
// normalised x. `scale`: see write_weights.
Sums run_hidden(Backward* b, fk_depthwise_mlp_backward* p, const float* scale) {
  const Mlp& m = b->m;
  const fk_table& k = kernels();
  const int64_t panel = b->panel, hidden = b->hidden, kinds = FK_SUM_TAPS + b->taps;
  const int64_t channels = blocks(m.channels, panel) * panel, out = blocks(m.out, panel) * panel;
  const bool steps = b->of_batch(0) || b->of_batch(1);
  ChannelNorm norm1(m.bn[0], m.hidden, hidden, b->of_batch(0), &b->memory);
  ChannelNorm norm2(m.bn[1], m.hidden, hidden, b->of_batch(1), &b->memory);
  p->norm1 = norm1.vectors;
  p->norm2 = norm2.vectors;
  char* sizing = nullptr;
  p->stores = steps ? &sizing : nullptr;
  p->chunk_maps = steps && chunks_are_tasks(*p, hidden) ? reinterpret_cast<char*>(&sizing) : nullptr;
  choose_tiles(p, hidden);
  p->first = 0;
  p->rows = steps ? p->chunk : hidden;
  std::vector<char*> stores;
  if (steps) {
    stores = take_stores(blocks(m.batch, p->stack), k.store_depthwise_mlp_backward(p), &b->memory);
    p->stores = stores.data();
  }
  if (!p->chunk_maps) {
    const int64_t groups = std::max<int64_t>(1, p->groups);
    p->expand_sums = p->wants_expand ? b->memory.take<float>(groups * p->rows * channels) : nullptr;
    p->project_sums = p->wants_project ? b->memory.take<float>(groups * p->rows * out) : nullptr;
    p->sums = b->memory.take<double>(groups * kinds * p->rows);
  }
  p->normed_grad = p->wants_input ? b->memory.take<float>(p->slices * m.batch * b->pixels * channels) : nullptr;
  Sums sums;
  sums.channels.assign(static_cast<size_t>(kinds * hidden), 0.0);
  if (m.batch == 0) {
    if (p->expand_sums) std::fill(p->expand_sums, p->expand_sums + p->rows * channels, 0.0f);
    if (p->project_sums) std::fill(p->project_sums, p->project_sums + p->rows * out, 0.0f);
  }
  for (size_t index : {kExpand, kProject})
    if (b->needs[index]) b->found[index] = gradient_of(*b->t[index]);
  // Adds the groups up, in order, for the hidden channels that there are sums of.
  auto add_channels = [&](const fk_depthwise_mlp_backward& of, int64_t rows) {
    for (int64_t kind = 0; kind < kinds; ++kind) {
      double* to = sums.channels.data() + kind * hidden + of.first;
      std::fill(to, to + rows, 0.0);
      for (int64_t g = 0; g < of.groups; ++g) {
        const double* from = of.sums + (g * kinds + kind) * of.rows;
        for (int64_t c = 0; c < rows; ++c) to[c] += from[c];
      }
    }
  };
  const auto on_all_threads = [](int64_t tasks, const auto& task) { run_tasks(tasks, 0, task); };
  const int64_t scratch_bytes = blocks(k.scratch_depthwise_mlp_backward(p), kAlignment) * kAlignment;
  if (!steps) {
    run_tasks(p->groups * p->slices, scratch_bytes,
              [&](int64_t task, void* memory) { k.depthwise_mlp_backward(p, task, memory); });
    add_channels(*p, hidden);
    write_weights(b, *p, hidden, scale, on_all_threads);
    if (!b->needs[kBn3]) return sums;
    sums.project = p->project_sums;
    for_rows(sums.project ? hidden : 0, [&](int64_t row) {
      float* to = p->project_sums + row * out;
      for (int64_t g = 1; g < p->groups; ++g)
        for (int64_t n = 0; n < out; ++n) to[n] += to[g * hidden * out + n];
    });
    return sums;
  }
  const double count = static_cast<double>(m.batch * b->pixels);
  // Of the gradient behind a norm, alone and times the normalised value, and of this and its square: with the given
  // statistics they are not quite normalised, which would not average out.
  auto averages = [&](const fk_depthwise_mlp_backward& of, ChannelNorm* norm, int kind, int64_t rows) {
    if (!norm->grad_mean) return;
    for (int64_t c = of.first; c < of.first + rows; ++c) {
      double* sum = sums.channels.data() + kind * hidden + c;
      const double centre = sum[2 * hidden] / count, spread = sum[3 * hidden] / count - centre * centre;
      const double rstd = static_cast<double>(norm->rstd[c]) + norm->rest[c];
      const double scaled = spread + norm->eps * rstd * rstd;
      const double square = scaled > 0.0 ? 1.0 / scaled : 0.0;  // channels of the padding have none
      sum[hidden] -= centre * sum[0];
      const double slope = sum[hidden] / count * square;
      sum[hidden] *= std::sqrt(square);
      norm->grad_mean[c] = static_cast<float>(sum[0] / count - centre * slope);
      norm->grad_slope[c] = static_cast<float>(slope);
    }
  };
  // All steps of a chunk; `run` does the tasks behind them.
  auto work = [&](const fk_depthwise_mlp_backward& of, const auto& step, const auto& run) {
    const int64_t rows = std::min(of.rows, hidden - of.first);
    step(1);
    add_channels(of, rows);
    averages(of, &norm2, FK_SUM_NORM2, rows);
    step(2);
    add_channels(of, rows);
    averages(of, &norm1, FK_SUM_NORM1, rows);
    step(3);
    add_channels(of, rows);
    write_weights(b, of, rows, scale, run);
  };
  auto step = [&](int64_t index) {
    run_tasks(p->groups, scratch_bytes,
              [&](int64_t group, void* memory) { k.depthwise_mlp_backward_step(p, index, group, memory); });
  };
  step(0);
  if (!p->chunk_maps) {
    for (p->first = 0; p->first < hidden; p->first += p->chunk) work(*p, step, on_all_threads);
    return sums;
  }
  // Chunks as tasks: everything but what step 0 has prepared is a task's own.
  const int64_t maps = blocks(k.chunk_maps_depthwise_mlp_backward(p), kAlignment) * kAlignment;
  const int64_t expand = p->wants_expand ? 4 * p->rows * channels : 0,
                project = p->wants_project ? 4 * p->rows * out : 0;
  run_tasks(p->slices, scratch_bytes + maps + expand + project + 8 * kinds * p->rows, [&](int64_t task, void* memory) {
    fk_depthwise_mlp_backward own = *p;
    own.first = task * p->chunk;
    own.chunk_maps = static_cast<char*>(memory) + scratch_bytes;
    own.expand_sums = expand ? reinterpret_cast<float*>(own.chunk_maps + maps) : nullptr;
    own.project_sums = project ? reinterpret_cast<float*>(own.chunk_maps + maps + expand) : nullptr;
    own.sums = reinterpret_cast<double*>(own.chunk_maps + maps + expand + project);
    work(
        own, [&](int64_t index) { k.depthwise_mlp_backward_step(&own, index, 0, memory); },
        [](int64_t tasks, const auto& each) {
          for (int64_t i = 0; i < tasks; ++i) each(i, nullptr);
        });
  });
  return sums;
}

std::vector<double> channel_sums(const Sums& sums, int kind, int64_t hidden) {
  return {sums.channels.begin() + kind * hidden, sums.channels.begin() + (kind + 1) * hidden};
}

void hidden_gradients(Backward* b, const Sums& sums, bool wants_hidden) {
  const Mlp& m = b->m;
  const int64_t hidden = b->hidden;
  const std::vector<double> zero(static_cast<size_t>(hidden), 0.0);
  // A bias right in front of batch statistics has no effect.
  const bool first = b->of_batch(0) && !m.bn_after_activation, second = b->of_batch(1) && !m.bn_after_activation;
  if (wants_hidden) {
    write_vector(b, kExpandBias, first ? zero : channel_sums(sums, FK_SUM_EXPANDED, hidden));
    write_vector(b, kBn1, channel_sums(sums, FK_SUM_NORM1_X, hidden));
    write_vector(b, kBn1 + 1, channel_sums(sums, FK_SUM_NORM1, hidden));
  }
  write_vector(b, kFilterBias, second ? zero : channel_sums(sums, FK_SUM_FILTERED, hidden));
  write_vector(b, kBn2, channel_sums(sums, FK_SUM_NORM2_X, hidden));
  write_vector(b, kBn2 + 1, channel_sums(sums, FK_SUM_NORM2, hidden));
  if (b->needs[kFilter]) {
    const Tensor& out = b->found[kFilter] = gradient_of(*b->t[kFilter]);
    const Writer writer(out);
    for (int64_t c = 0; c < m.hidden; ++c)
      for (int64_t tap = 0; tap < b->taps; ++tap)
        writer.set(c * b->taps + tap, static_cast<float>(sums.channels[(FK_SUM_TAPS + tap) * hidden + c]));
  }
}

// Those of a batch norm with running statistics behind the second linear, from the sums of the branch's gradient.
void last_norm_gradients(Backward* b, const Sums& sums, const std::vector<double>& grads) {
  const Mlp& m = b->m;
  const int64_t columns = blocks(m.out, b->panel) * b->panel;
  if (!m.bn[2].present() || b->training) return;
  std::vector<double> weight(static_cast<size_t>(m.out), 0.0);
  if (b->needs[kBn3])
    for (int64_t n = 0; n < m.out; ++n) {
      double total = (m.project_bias.data ? element(m.project_bias, n) : 0.0) - element(m.bn[2].mean, n);
      total *= grads[n];
      for (int64_t c = 0; c < m.hidden; ++c)
        total += static_cast<double>(element(m.project, n * m.hidden + c)) * sums.project[c * columns + n];
      weight[n] = total / std::sqrt(element(m.bn[2].var, n) + m.bn[2].eps);
    }
  write_vector(b, kBn3, weight);
  write_vector(b, kBn3 + 1, grads);
}

void input_gradients(Backward* b, const fk_depthwise_mlp_backward& p) {
  const Mlp& m = b->m;
  const int64_t stride = blocks(m.channels, b->panel) * b->panel;
  NormGradients out;
  std::vector<double> weight, bias;
  if (b->needs[kX]) {
    Tensor& grad = b->found[kX] = gradient_of(*b->t[kX]);
    out.x = grad.mutable_data_ptr();
    const Writer writer(grad);
    out.own = b->own;
    std::vector<float> prefix(static_cast<size_t>(b->o.prefix * m.channels), 0.0f);
    for (int64_t image = 0; image < m.batch; ++image) {
      const int64_t at = image * m.tokens * m.channels;
      if (b->own.data) read_values(b->own, at, b->o.prefix * m.channels, prefix.data());
      writer.set(at, prefix.data(), b->o.prefix * m.channels);
    }
  }
  if (b->needs[kNormWeight]) out.weight = &weight;
  if (b->needs[kNormBias]) out.bias = &bias;
  if (b->needs[kStatistics]) {
    Tensor& grad = b->found[kStatistics] = gradient_of(*b->t[kStatistics]);
    out.statistics = static_cast<float*>(grad.mutable_data_ptr());
  }
  norm_gradients(p.x, p.norm, b->t[kStatistics].has_value(), p.normed_grad, stride, p.slices, m.batch, b->o.prefix,
                 b->pixels, m.channels, out);
  write_vector(b, kNormWeight, weight);
  write_vector(b, kNormBias, bias);
}

std::vector<Tensor> collect(Backward* b) {
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < kCount; ++i)
    if (b->needs[i]) gradients.push_back(b->found[i]);
  return gradients;
}

std::vector<Tensor> run_backward(std::vector<Tensor>& grads, TensorList& t, const Needs& needs, const Options& o,
                                 bool training) {
  const bool own = takes_own(needs, kCount);
  Backward b = {t, o, needs, training, check(t, std::nullopt, o), {}, {}, 0, 0, 0, 0, absent()};
  const Mlp& m = b.m;
  for (size_t i = 0; i < kCount; ++i) STD_TORCH_CHECK(!needs[i] || t[i].has_value(), "needs: one of an absent tensor");
  for (size_t first : {kBn1, kBn2, kBn3})
    STD_TORCH_CHECK(!needs[first + 2] && !needs[first + 3], "needs: statistics of a batch norm have no gradient here");
  STD_TORCH_CHECK(m.kernel <= 7, "dw_weight: expected a kernel of at most 7");
  view(*t[kX], "x");
  view(t[kResidual], "residual", {m.batch, m.tokens, m.out});
  STD_TORCH_CHECK(!t[kStatistics].has_value() || m.norm == FK_GROUP_NORM, "norm_statistics: there is no GroupNorm");
  STD_TORCH_CHECK(o.out_norm_eps.has_value() || (!t[kOutNormWeight].has_value() && !t[kOutNormBias].has_value()),
                  "out_norm_weight, out_norm_bias: there is no such norm");
  STD_TORCH_CHECK(!training || !m.bn[2].present() || (!o.out_norm_eps.has_value() && o.summary != "statistics"),
                  "bn3: batch statistics in front of another norm");
  b.found.assign(kCount, no_statistics());
  b.pixels = o.height * o.width;
  b.panel = kernels().panel;
  b.hidden = blocks(m.hidden, b.panel) * b.panel;
  b.taps = m.kernel * m.kernel;

  const ScalarType out_dtype = promoted(o.dtype, t[kResidual]);
  // What the forward kept comes last.
  std::optional<Tensor> kept, raw_branch;
  if (b.of_batch(2) && grads.size() > 2) {
    STD_TORCH_CHECK(grads.size() == 4, "grads: expected 2 or 4 entries, got ", grads.size());
    kept = grads[2];
    raw_branch = grads[3];
    grads.resize(2);
  }
  if (o.out_norm_eps.has_value() && grads.size() % 2 == 1) {
    raw_branch = grads.back();
    grads.pop_back();
  }
  auto results = take_results(grads, {m.batch, m.tokens, m.out}, out_dtype);
  STD_TORCH_CHECK(grads.size() == 2, "grads: expected 2 entries, got ", grads.size());
  STD_TORCH_CHECK(grads[0].scalar_type() == out_dtype, "grads: unexpected dtype");
  const fk_array grad = view(grads[0], "grads", {m.batch, m.tokens, m.out});
  const bool statistics = o.summary == "statistics";
  if (own && needs[kX]) {
    STD_TORCH_CHECK(!statistics && grad.size == t[kX]->numel() && out_dtype == t[kX]->scalar_type(),
                    "needs: the residual cannot be x");
    b.own = grad;
  }
  fk_array summary = absent();
  if (o.summary != "none") {
    summary = view(grads[1], "grads", {m.batch, statistics ? 2 : m.out});
    STD_TORCH_CHECK(summary.dtype == FK_F32, "grads: expected the summary's in float32");
    if (!any_nonzero(summary)) summary = absent();
  }
  const bool normed = o.out_norm_eps.has_value(), normalises = b.of_batch(2);

  fk_depthwise_mlp_backward p = {};
  p.wants_project = needs[kProject] || (needs[kBn3] && !training);
  p.wants_filter = needs[kFilter] || needs[kFilterBias];
  p.wants_expand = needs[kExpand];
  p.wants_input = b.needs_any({kX, kNormWeight, kNormBias, kStatistics});
  p.wants_hidden = p.wants_expand || p.wants_input || b.needs_any({kExpandBias, kBn1, kBn1 + 1});
  const bool runs = p.wants_project || p.wants_filter || p.wants_hidden || b.needs_any({kBn2, kBn2 + 1});
  const bool branch = runs || b.needs_any({kProjectBias, kBn3, kBn3 + 1, kOutNormWeight, kOutNormBias});

  // The forward again, as far as its results matter and did not come along.
  std::optional<Outputs> again;
  const bool of_statistics = summary.data && statistics;
  if ((of_statistics && !results) || (branch && normed && !raw_branch))
    again = forward(t, std::nullopt, o, std::nullopt);
  if (of_statistics && !results) results = std::make_tuple(again->out, again->summary);
  float* map = nullptr;
  if (summary.data || normed || normalises) map = gather(&b, grad, summary, of_statistics ? results : std::nullopt);
  if (needs[kResidual]) residual_gradient(&b, grad, of_statistics ? map : nullptr);
  if (!branch) return collect(&b);

  p.grad = map ? fk_array{map, FK_F32, m.batch * b.pixels * m.out} : grad;
  p.grad_prefix = map ? 0 : o.prefix;
  if (normed) {
    const fk_array raw = branch_view(again ? again->raw : *raw_branch, m, b.pixels);
    const fk_norm norm = [&] {
      fk_norm n = {nullptr, nullptr, static_cast<float>(*o.out_norm_eps), FK_GROUP_NORM, nullptr};
      float* values = b.memory.take<float>(2 * m.out);
      for (int64_t c = 0; c < m.out; ++c) {
        values[c] = m.out_norm_weight.data ? element(m.out_norm_weight, c) : 1.0f;
        values[m.out + c] = m.out_norm_bias.data ? element(m.out_norm_bias, c) : 0.0f;
      }
      n.weight = values;
      n.bias = values + m.out;
      return n;
    }();
    fk_norm with_groups = norm;
    std::vector<float> groups;
    set_group_statistics(&with_groups, nullptr, raw, m.batch, 0, b.pixels, m.out, &groups);
    std::vector<double> weight, bias;
    NormGradients out;
    out.x = b.memory.take<float>(raw.size);
    out.weight = &weight;
    out.bias = &bias;
    norm_gradients(raw, with_groups, false, map, m.out, 1, m.batch, 0, b.pixels, m.out, out);
    write_vector(&b, kOutNormWeight, weight);
    write_vector(&b, kOutNormBias, bias);
    p.grad = {out.x, FK_F32, raw.size};
  } else if (normalises && raw_branch) {
    batch_norm_gradients(&b, map, branch_view(*raw_branch, m, b.pixels), 0);
  } else if (normalises) {
    TensorList inner = t;
    for (size_t i = kBn3; i < kBn3 + 4; ++i) inner[i].reset();
    inner[kResidual].reset();
    Options plain = o;
    plain.summary = "none";
    const Outputs found = forward(inner, std::nullopt, plain, ScalarType::Float);
    batch_norm_gradients(&b, map, view(found.out, "out"), o.prefix);
  }
  std::vector<double> scale(static_cast<size_t>(m.out), 1.0);
  for (int64_t n = 0; m.bn[2].present() && !training && n < m.out; ++n) scale[n] = m.bn[2].scale(n);
  std::vector<double> sums;
  if (b.needs_any({kProjectBias, kBn3, kBn3 + 1})) {
    sums = column_sums(p.grad, m.batch, p.grad_prefix, b.pixels, m.out);
    std::vector<double> bias(sums);
    for (int64_t n = 0; n < m.out; ++n) bias[n] = normalises ? 0.0 : bias[n] * scale[n];
    write_vector(&b, kProjectBias, bias);
  }
  if (!runs) {
    if (m.bn[2].present() && !training) write_vector(&b, kBn3 + 1, sums);
    return collect(&b);
  }

  std::vector<float> groups;
  const Tensor block = describe_hidden(m, o, t, &b.memory, &groups, &p, kept.has_value());
  if (kept) take_kept(m, o, *kept, &p);
  // Running statistics behind the second linear scale the gradient that passes through it.
  std::vector<float> scaled;
  fk_array project = m.project;
  if (m.bn[2].present() && !training) {
    scaled.resize(static_cast<size_t>(m.out * m.hidden));
    for (int64_t n = 0; n < m.out; ++n)
      for (int64_t c = 0; c < m.hidden; ++c)
        scaled[n * m.hidden + c] = static_cast<float>(element(m.project, n * m.hidden + c) * scale[n]);
    project = {scaled.data(), FK_F32, m.out * m.hidden};
  }
  const Tensor back = pack_once([&](Packer& packer) {
    p.project_back = packer.transposed(project, m.hidden, m.out, m.low_precision);
    if (p.wants_input) p.expand_back = packer.transposed(m.expand, m.channels, m.hidden, m.low_precision);
  });
  float* scales = b.memory.take<float>(blocks(m.out, b.panel) * b.panel);
  for (int64_t n = 0; n < m.out; ++n) scales[n] = static_cast<float>(scale[n]);
  const Sums found = run_hidden(&b, &p, m.bn[2].present() && !training ? scales : nullptr);
  hidden_gradients(&b, found, p.wants_hidden);
  last_norm_gradients(&b, found, sums);
  if (p.wants_input) input_gradients(&b, p);
  return collect(&b);
}

std::vector<Tensor> run(std::vector<Tensor> grads, TensorList t, std::vector<bool> needs, std::string norm,
                        double norm_eps, std::string hidden_activation, std::string activation,
                        std::string inner_residual, bool bn_after_activation, std::vector<double> bn_eps, bool training,
                        std::optional<double> out_norm_eps, int64_t height, int64_t width, int64_t prefix,
                        std::string summary, ScalarType dtype) {
  return run_backward(grads, t, needs,
                      {norm, norm_eps, hidden_activation, activation, inner_residual, bn_after_activation, bn_eps,
                       out_norm_eps, height, width, prefix, summary, dtype},
                      training);
}

}  // namespace
}  // namespace fk::mlp

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) { m.impl("depthwise_mlp_backward.native", TORCH_BOX(&fk::mlp::run)); }
