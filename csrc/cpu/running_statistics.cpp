// What a batch norm in training does to its running statistics, for all those of an operator in one call: each on its
// own costs more to ask for than to compute.

#include <cmath>

#include "support.h"

namespace fk {
namespace {

// As torch's lerp_ to the bit: from whichever end is nearer, rounded once.
float between(float from, float to, float weight) {
  return weight < 0.5f ? std::fma(weight, to - from, from) : std::fma(weight - 1.0f, to - from, to);
}

// Means and variances in turn. The batch's variances are biased: `corrections` make them what is tracked.
void run(std::vector<Tensor> running, std::vector<Tensor> batch, std::vector<double> momenta,
         std::vector<double> corrections) {
  const size_t norms = momenta.size();
  STD_TORCH_CHECK(corrections.size() == norms, "corrections: expected ", norms, " entries, got ", corrections.size());
  STD_TORCH_CHECK(running.size() == 2 * norms, "running: expected ", 2 * norms, " entries, got ", running.size());
  STD_TORCH_CHECK(batch.size() == 2 * norms, "batch: expected ", 2 * norms, " entries, got ", batch.size());
  for (size_t i = 0; i < running.size(); ++i) {
    check_same_shape(batch[i], running[i], "batch");
    STD_TORCH_CHECK(view(running[i], "running").dtype == FK_F32, "running: expected float32");
    STD_TORCH_CHECK(view(batch[i], "batch").dtype == FK_F32, "batch: expected float32");
  }
  for (size_t i = 0; i < running.size(); ++i) {
    const float* from = static_cast<const float*>(batch[i].const_data_ptr());
    float* to = static_cast<float*>(running[i].mutable_data_ptr());
    const float weight = static_cast<float>(momenta[i / 2]);
    const float factor = i % 2 ? static_cast<float>(corrections[i / 2]) : 1.0f;
    for (int64_t c = 0; c < running[i].numel(); ++c) to[c] = between(to[c], from[c] * factor, weight);
  }
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) { m.impl("update_running_statistics", TORCH_BOX(&fk::run)); }
