// GroupNorm with one group: statistics of whole images, taken from a tensor or computed here.
#pragma once

#include "support.h"

namespace fk {

fk_norm_kind norm_kind(const std::string& name);

// Rows of a task that reads rows once.
constexpr int64_t kMomentRows = 64;

// What the tasks of an operator report of their rows, and what becomes of it.
class Moments {
 public:
  Moments(int64_t images, int64_t tasks_per_image)
      : images_(images), tasks_per_image_(tasks_per_image), sums_(static_cast<size_t>(3 * images * tasks_per_image)) {}
  double* data() { return sums_.data(); }
  // Mean and biased variance of each image, which has this many rows.
  std::vector<double> finish(int64_t rows, int64_t columns) const;
  // The same as float32 [images, 2].
  void write(int64_t rows, int64_t columns, void* to) const;

 private:
  int64_t images_, tasks_per_image_;
  std::vector<double> sums_;
};

// The statistics that a caller gave as [images, 2] (mean, variance); null: none, or there is no such norm.
const void* group_statistics(const fk_norm& norm, const std::optional<Tensor>& given, int64_t images);
// Sets the norm's statistics of each image: those `given`, or those of x [images, skipped + rows, columns] without the
// skipped rows. `memory` holds them.
void set_group_statistics(fk_norm* norm, const void* given, const fk_array& x, int64_t images, int64_t skipped,
                          int64_t rows, int64_t columns, std::vector<float>* memory);

// The same from statistics at hand.
void set_group_statistics(fk_norm* norm, const std::vector<double>& statistics, std::vector<float>* memory);

Tensor no_statistics();

}  // namespace fk
