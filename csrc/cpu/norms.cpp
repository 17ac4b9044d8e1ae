#include "norms.h"

#include <cmath>

namespace fk {

fk_norm_kind norm_kind(const std::string& name) {
  STD_TORCH_CHECK(name == "none" || name == "layer" || name == "group", "norm: unknown kind");
  return name == "none" ? FK_NO_NORM : name == "layer" ? FK_LAYER_NORM : FK_GROUP_NORM;
}

std::vector<double> Moments::finish(int64_t rows, int64_t columns) const {
  std::vector<double> found(static_cast<size_t>(2 * images_));
  const double n = static_cast<double>(rows);
  for (int64_t image = 0; image < images_; ++image) {
    double total[3] = {};
    for (int64_t task = image * tasks_per_image_; task < (image + 1) * tasks_per_image_; ++task)
      for (int i = 0; i < 3; ++i) total[i] += sums_[3 * task + i];
    const double mean = total[0] / n;
    const double between = total[2] / n - mean * mean;
    found[2 * image] = mean;
    found[2 * image + 1] = total[1] / (n * static_cast<double>(columns)) + std::max(between, 0.0);
  }
  return found;
}

void Moments::write(int64_t rows, int64_t columns, void* to) const {
  float* next = static_cast<float*>(to);
  for (double value : finish(rows, columns)) *next++ = static_cast<float>(value);
}

const void* group_statistics(const fk_norm& norm, const std::optional<Tensor>& given, int64_t images) {
  if (norm.kind != FK_GROUP_NORM || !given.has_value()) return nullptr;
  const fk_array array = view(given, "norm_statistics", {images, 2});
  STD_TORCH_CHECK(array.dtype == FK_F32, "norm_statistics: expected float32");
  return array.data;
}

void set_group_statistics(fk_norm* norm, const void* given, const fk_array& x, int64_t images, int64_t skipped,
                          int64_t rows, int64_t columns, std::vector<float>* memory) {
  if (norm->kind != FK_GROUP_NORM) return;
  std::vector<double> statistics;
  if (given) {
    const float* from = static_cast<const float*>(given);
    statistics.assign(from, from + 2 * images);
  } else {
    const int64_t tasks_per_image = blocks(rows, kMomentRows);
    Moments moments(images, tasks_per_image);
    const fk_moments p = {x, images, rows, skipped, columns, kMomentRows, tasks_per_image, moments.data()};
    run_tasks(images * tasks_per_image, 0, [&](int64_t task, void*) { kernels().moments(&p, task); });
    statistics = moments.finish(rows, columns);
  }
  set_group_statistics(norm, statistics, memory);
}

void set_group_statistics(fk_norm* norm, const std::vector<double>& statistics, std::vector<float>* memory) {
  memory->resize(statistics.size());
  for (size_t i = 0; i < statistics.size(); i += 2) {
    (*memory)[i] = static_cast<float>(statistics[i]);
    (*memory)[i + 1] = static_cast<float>(1.0 / std::sqrt(statistics[i + 1] + norm->eps));
  }
  norm->groups = memory->data();
}

Tensor no_statistics() { return empty({0}, ScalarType::Float); }

}  // namespace fk
