#include "conv_gradients.h"

#include <cmath>
#include <cstring>

namespace fk {
namespace {

// Bands that a call is cut into at least, where it can be.
constexpr int64_t kTasks = 8;
constexpr int64_t kBandBytes = 256 * 1024;

}  // namespace

int64_t band_rows(int64_t batch, int64_t height, int64_t most) {
  const int64_t cached = blocks(height, std::max<int64_t>(1, most));
  const int64_t bands = std::max(cached, blocks(kTasks, std::max<int64_t>(1, batch)));
  return blocks(height, std::min(height, bands));
}

ConvSums::ConvSums(fk_conv_projection_backward* to, Memory* memory)
    : p_(*to), channels_(to->forward.channels), padded_(padded_channels(channels_)) {
  to->kinds = 0;
  for (const fk_conv_branch& b : to->forward.branch)
    to->kinds = std::max(to->kinds, FK_CONV_TAPS + b.kernel * b.kernel);
  const int64_t branches = sizeof to->branch / sizeof to->branch[0], values = branches * to->kinds * padded_;
  to->partials = partial_count(to->forward.batch * to->forward.tasks_per_image, 8 * values);
  to->sums = memory->take<double>(std::max<int64_t>(1, to->partials * values));
}

std::vector<double> ConvSums::of(int branch, int64_t kind) const {
  const int64_t branches = sizeof p_.branch / sizeof p_.branch[0];
  std::vector<double> sums(static_cast<size_t>(channels_), 0.0);
  for (int64_t i = 0; i < p_.partials; ++i) {
    const double* from = p_.sums + ((i * branches + branch) * p_.kinds + kind) * padded_;
    for (int64_t c = 0; c < channels_; ++c) sums[c] += from[c];
  }
  return sums;
}

std::vector<double> ConvSums::of_filter(int branch) const {
  const int64_t taps = p_.forward.branch[branch].kernel * p_.forward.branch[branch].kernel;
  std::vector<double> values(static_cast<size_t>(channels_ * taps));
  for (int64_t tap = 0; tap < taps; ++tap) {
    const std::vector<double> of_tap = of(branch, FK_CONV_TAPS + tap);
    for (int64_t c = 0; c < channels_; ++c) values[c * taps + tap] = of_tap[c];
  }
  return values;
}

void ConvSums::run(bool finish) const {
  const fk_table& k = kernels();
  run_tasks(p_.partials, k.scratch_conv_projection(&p_.forward),
            [&](int64_t partial, void* memory) { k.conv_projection_backward(&p_, partial, finish, memory); });
}

Tensor bordered_map(fk_conv_projection_backward* p, int branch) {
  const fk_conv_branch& f = p->forward.branch[branch];
  fk_conv_branch_backward& to = p->branch[branch];
  // The first and the last results that a pixel of the map asks for, whether or not they exist.
  to.border = blocks(std::max<int64_t>(0, f.kernel - 1 - f.padding), f.stride);
  to.slope_h = to.border + std::max(f.out_h, (p->forward.height - 1 + f.padding) / f.stride + 1);
  to.slope_w = to.border + std::max(f.out_w, (p->forward.width - 1 + f.padding) / f.stride + 1);
  const int64_t value = p->dtype == FK_F32 ? 4 : 2;
  const int64_t image = to.slope_h * to.slope_w * padded_channels(p->forward.channels) * value;
  Tensor map = empty({p->forward.batch * image}, ScalarType::Byte);
  char* slopes = static_cast<char*>(map.mutable_data_ptr());
  run_tasks(p->forward.batch, 0,
            [&](int64_t i, void*) { std::memset(slopes + i * image, 0, static_cast<size_t>(image)); });
  to.slopes = slopes;
  return map;
}

void batch_norm_gradients(const BatchNorm& bn, bool of_batch, const std::vector<double>& alone,
                          const std::vector<double>& times, size_t first, Gradients* found) {
  found->set(first, times);
  found->set(first + 1, alone);
  // Statistics of the batch itself are made again by whoever differentiates: those given are not read.
  std::vector<double> mean(alone.size(), 0.0), variance(alone.size(), 0.0);
  for (size_t c = 0; !of_batch && c < alone.size(); ++c) {
    const double scale = bn.scale(static_cast<int64_t>(c));
    mean[c] = -scale * alone[c];
    variance[c] = -0.5 * scale * times[c] / std::sqrt(element(bn.var, static_cast<int64_t>(c)) + bn.eps);
  }
  found->set(first + 2, mean);
  found->set(first + 3, variance);
}

void map_gradients(fk_conv_projection_backward* p, size_t x, size_t norm_weight, size_t norm_bias, Gradients* found) {
  const fk_conv_projection& f = p->forward;
  const int64_t row = 4 * padded_channels(f.channels) * f.width;
  p->rows_per_band = band_rows(f.batch, f.height, kBandBytes / std::max<int64_t>(1, row));
  p->bands = blocks(f.height, p->rows_per_band);
  p->dx = found->data(x);
  p->affine = found->affine_sums(norm_weight, norm_bias, f.batch * p->bands, f.channels);
  const fk_table& k = kernels();
  run_tasks(f.batch * p->bands, k.scratch_conv_projection_input(p),
            [&](int64_t task, void* memory) { k.conv_projection_input(p, task, memory); });
}

}  // namespace fk
