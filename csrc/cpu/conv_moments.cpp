#include "conv_moments.h"

namespace fk {
namespace {

constexpr int kBranches = 3;

// Output pixels of a branch in one band of input rows; the kernels draw the same borders.
int64_t band_pixels(const fk_conv_projection& c, int branch, int64_t tile) {
  const fk_conv_branch& b = c.branch[branch];
  auto border = [&](int64_t rows) { return std::min(b.out_h, (rows + b.stride - 1) / b.stride); };
  const int64_t first = border(tile * c.rows_per_task);
  const int64_t last = tile + 1 == c.tasks_per_image ? b.out_h : border((tile + 1) * c.rows_per_task);
  return (last - first) * b.out_w;
}

}  // namespace

ConvMoments conv_moments(fk_conv_projection* c) {
  const int64_t tasks = c->batch * c->tasks_per_image, per_task = kBranches * 2 * c->channels;
  std::vector<double> partial(static_cast<size_t>(std::max<int64_t>(1, tasks * per_task)));
  c->statistics = partial.data();
  const fk_table& k = kernels();
  run_tasks(tasks, k.scratch_conv_projection(c),
            [&](int64_t task, void* memory) { k.conv_projection(c, task, memory); });
  c->statistics = nullptr;
  ConvMoments moments;
  for (int i = 0; i < kBranches; ++i)
    for (int64_t ch = 0; ch < c->channels; ++ch) {
      double count = 0.0, mean = 0.0, squares = 0.0;
      for (int64_t task = 0; task < tasks; ++task) {
        const double n = static_cast<double>(band_pixels(*c, i, task % c->tasks_per_image));
        if (n == 0.0) continue;
        const double* from = partial.data() + task * per_task + 2 * i * c->channels;
        const double band_mean = from[ch] / n, delta = band_mean - mean, total = count + n;
        mean += delta * n / total;
        squares += from[c->channels + ch] + delta * delta * count * n / total;
        count = total;
      }
      moments.mean[i].push_back(mean);
      moments.variance[i].push_back(count > 0.0 ? squares / count : 0.0);
    }
  return moments;
}

}  // namespace fk
