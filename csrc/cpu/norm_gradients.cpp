#include "norm_gradients.h"

#include <cstring>

namespace fk {

Tensor gradient_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return empty(std::vector<int64_t>(sizes.begin(), sizes.end()), tensor.scalar_type());
}

uint16_t Writer::rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

void Writer::set(int64_t first, const float* values, int64_t n) const {
  if (wide_) {
    std::memcpy(static_cast<float*>(data_) + first, values, static_cast<size_t>(4 * n));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(data_) + first;
  for (int64_t i = 0; i < n; ++i) to[i] = rounded(values[i]);
}

void read_values(const fk_array& from, int64_t at, int64_t n, float* to) {
  if (from.dtype == FK_F32) {
    std::memcpy(to, static_cast<const float*>(from.data) + at, static_cast<size_t>(4 * n));
    return;
  }
  const uint16_t* values = static_cast<const uint16_t*>(from.data) + at;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

namespace {

// Rows of a task that sums over rows.
constexpr int64_t kSumRows = 128;

// Columns added over tasks, in order.
template <class T>
std::vector<double> added(const std::vector<T>& partial, int64_t tasks, int64_t stride, int64_t columns) {
  std::vector<double> sums(static_cast<size_t>(columns), 0.0);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t c = 0; c < columns; ++c) sums[c] += partial[task * stride + c];
  return sums;
}

}  // namespace

std::vector<double> column_sums(const fk_array& x, int64_t images, int64_t skipped, int64_t rows, int64_t columns) {
  const int64_t per_image = blocks(rows, kSumRows), tasks = images * per_image;
  std::vector<double> partial(static_cast<size_t>(tasks * columns), 0.0);
  run_tasks(tasks, 0, [&](int64_t task, void*) {
    const int64_t image = task / per_image, first = task % per_image * kSumRows;
    double* to = partial.data() + task * columns;
    std::vector<float> wide(static_cast<size_t>(x.dtype == FK_F32 ? 0 : columns));
    for (int64_t i = first; i < std::min(rows, first + kSumRows); ++i) {
      const int64_t at = (image * (skipped + rows) + skipped + i) * columns;
      const float* row = static_cast<const float*>(x.data) + at;
      if (x.dtype != FK_F32) {
        read_values(x, at, columns, wide.data());
        row = wide.data();
      }
      for (int64_t c = 0; c < columns; ++c) to[c] += row[c];
    }
  });
  return added(partial, tasks, columns, columns);
}

void norm_gradients(const fk_array& x, const fk_norm& norm, bool given, const float* grad, int64_t stride,
                    int64_t parts, int64_t images, int64_t skipped, int64_t rows, int64_t columns,
                    const NormGradients& out) {
  const int64_t per_image = blocks(rows, kSumRows), tasks = images * per_image;
  const bool group = norm.kind == FK_GROUP_NORM, affine = out.weight || out.bias;
  std::vector<float> sums(static_cast<size_t>(affine ? tasks * 2 * columns : 0));
  std::vector<double> totals(static_cast<size_t>(group ? 2 * tasks : 0)), means(static_cast<size_t>(2 * images), 0.0);
  fk_norm_backward p = {x,
                        norm,
                        grad,
                        stride,
                        parts,
                        out.x,
                        out.own,
                        images,
                        rows,
                        skipped,
                        columns,
                        kSumRows,
                        per_image,
                        affine ? sums.data() : nullptr,
                        totals.data(),
                        nullptr};
  if (group && (out.statistics || (out.x && !given))) {
    run_tasks(tasks, 0, [&](int64_t task, void*) { kernels().norm_backward_totals(&p, task); });
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t task = image * per_image; task < (image + 1) * per_image; ++task)
        for (int i = 0; i < 2; ++i) means[2 * image + i] += totals[2 * task + i];
      const double rstd = norm.groups[2 * image + 1];
      if (out.statistics) {
        out.statistics[2 * image] = static_cast<float>(-rstd * means[2 * image]);
        out.statistics[2 * image + 1] = static_cast<float>(-0.5 * rstd * rstd * means[2 * image + 1]);
      }
      for (int i = 0; i < 2; ++i) means[2 * image + i] /= static_cast<double>(rows * columns);
    }
    if (!given) p.means = means.data();
  }
  if (out.x || affine) run_tasks(tasks, 0, [&](int64_t task, void*) { kernels().norm_backward(&p, task); });
  if (!affine) return;
  const std::vector<double> found = added(sums, tasks, 2 * columns, 2 * columns);
  if (out.weight) out.weight->assign(found.begin(), found.begin() + columns);
  if (out.bias) out.bias->assign(found.begin() + columns, found.end());
}

}  // namespace fk
