#include <numeric>

#include "channel_norm.h"
#include "conv_gradients.h"
#include "plan.h"

namespace fk::norm_act {
namespace {

enum Index { kX, kBn, kCount = kBn + 4 };

// Rows of a task. Sums do not depend on the number of threads.
constexpr int64_t kRows = 256;

struct Call {
  // Rows of channels that fill no vectors are taken together, as one row of more columns.
  fk_batch_norm_act kernel;
  BatchNorm bn;
  std::vector<int64_t> shape;
  int64_t channels, tasks;

  void run(fk_norm_act_step step) const {
    const fk_table& k = kernels();
    run_tasks(tasks, k.scratch_batch_norm_act(&kernel),
              [&](int64_t task, void* scratch) { k.batch_norm_act(&kernel, step, task, scratch); });
  }
  double rows() const { return static_cast<double>(shape[0] * shape[1]); }
  // One of the `kinds` of sums that tasks keep, over all of them.
  std::vector<double> total(const std::vector<double>& sums, int64_t kinds, int64_t kind) const {
    std::vector<double> found(static_cast<size_t>(kernel.columns), 0.0);
    for (int64_t task = 0; task < tasks; ++task)
      for (int64_t c = 0; c < kernel.columns; ++c) found[c] += sums[(task * kinds + kind) * kernel.columns + c];
    return folded(found);
  }
  // Those of a row's columns as those of the channels.
  std::vector<double> folded(std::vector<double> sums) const {
    for (int64_t c = channels; c < kernel.columns; ++c) sums[c % channels] += sums[c];
    sums.resize(static_cast<size_t>(channels));
    return sums;
  }
  ChannelNorm norm(bool of_batch, Memory* memory) {
    ChannelNorm found(bn, channels, padded_channels(kernel.columns), of_batch, memory);
    found.repeat(channels, kernel.columns);
    kernel.norm = found.vectors;
    return found;
  }
};

Call check(TensorList& t, const std::string& activation, bool bn_after_activation, double bn_eps, ScalarType dtype) {
  check_count(t, kCount);
  const Tensor& x = required(t, kX, "x");
  STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions");
  const int64_t channels = x.size(2), rows = x.size(0) * x.size(1), lanes = kernels().lanes;
  for (size_t i = kBn; i < kCount; ++i)
    if (t[i].has_value() && !t[i]->is_contiguous()) t[i] = torch::stable::contiguous(*t[i]);
  Call call = {};
  call.bn = batch_norm(t, kBn, channels, bn_eps);
  STD_TORCH_CHECK(call.bn.present(), "bn: expected statistics");
  call.shape = {x.size(0), x.size(1), channels};
  fk_batch_norm_act& p = call.kernel;
  p.x = view(x, "x");
  p.activation = activation_of(activation);
  p.activation_first = bn_after_activation;
  int64_t together = lanes / std::gcd(channels, lanes);
  if (rows % together) together = 1;
  call.channels = channels;
  p.rows = rows / together;
  p.columns = channels * together;
  p.rows_per_task = kRows;
  p.out_dtype = kernel_dtype(dtype);
  call.tasks = blocks(p.rows, p.rows_per_task);
  return call;
}

Tensor run(TensorList t, std::optional<Tensor> packed, std::string activation, bool bn_after_activation, double bn_eps,
           bool training, ScalarType dtype) {
  STD_TORCH_CHECK(!packed.has_value(), "packed: nothing is packed");
  Call call = check(t, activation, bn_after_activation, bn_eps, dtype);
  // A plan would not see the norm change.
  if (recording()) give_up_recording();
  Memory memory;
  call.norm(training, &memory);
  Tensor out = empty(call.shape, dtype);
  call.kernel.out = out.mutable_data_ptr();
  call.run(FK_NORM_ACT_RESULT);
  return out;
}

// Mean and biased variance [2, C] of what the norm meets in the batch.
Tensor statistics(TensorList t, std::string activation, bool bn_after_activation, double bn_eps, bool,
                  ScalarType dtype) {
  Call call = check(t, activation, bn_after_activation, bn_eps, dtype);
  const int64_t channels = call.channels, columns = call.kernel.columns;
  std::vector<double> sums(static_cast<size_t>(call.tasks * 2 * columns));
  call.kernel.sums = sums.data();
  call.run(FK_NORM_ACT_MOMENTS);
  Tensor out = empty({2, channels}, ScalarType::Float);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  std::vector<double> mean = call.total(sums, 2, 0);
  const std::vector<double> squares = call.total(sums, 2, 1);
  for (double& m : mean) m /= call.rows();
  std::vector<double> apart(static_cast<size_t>(columns), 0.0), means(mean);
  for (int64_t c = channels; c < columns; ++c) means.push_back(means[c - channels]);
  const int64_t rows = call.kernel.rows, per_task = call.kernel.rows_per_task;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const double own = static_cast<double>(std::min(per_task, rows - task * per_task));
    for (int64_t c = 0; c < columns; ++c) {
      const double delta = sums[task * 2 * columns + c] / own - means[c];
      apart[c] += own * delta * delta;
    }
  }
  apart = call.folded(apart);
  for (int64_t c = 0; c < channels; ++c) {
    to[c] = static_cast<float>(mean[c]);
    to[channels + c] = static_cast<float>((squares[c] + apart[c]) / call.rows());
  }
  return out;
}

std::vector<Tensor> backward(Grads grads, TensorList t, Needs needs, std::string activation, bool bn_after_activation,
                             double bn_eps, bool training, ScalarType dtype) {
  Call call = check(t, activation, bn_after_activation, bn_eps, dtype);
  call.kernel.grad = grad_view(grads, 0, 1, call.shape, dtype);
  Gradients found(t, needs);
  Memory memory;
  ChannelNorm norm = call.norm(training, &memory);
  bool wants_sums = training;
  for (size_t i = kBn; i < kCount; ++i) wants_sums |= found.wants(i);
  if (wants_sums) {
    std::vector<double> sums(static_cast<size_t>(call.tasks * 3 * call.kernel.columns));
    call.kernel.sums = sums.data();
    call.run(FK_NORM_ACT_SUMS);
    const std::vector<double> alone = call.total(sums, 3, 0), times = call.total(sums, 3, 1);
    batch_norm_gradients(call.bn, training, alone, times, kBn, &found);
    if (training && call.tasks > 0) {
      norm.set_gradients(alone, times, call.total(sums, 3, 2), call.rows());
      norm.repeat(call.channels, call.kernel.columns);
    }
  }
  if (found.wants(kX)) {
    call.kernel.out = found.data(kX);
    call.run(FK_NORM_ACT_INPUT);
  }
  return found.finish();
}

// Nothing is packed.
Tensor pack_only(TensorList t, std::string activation, bool bn_after_activation, double bn_eps, bool,
                 ScalarType dtype) {
  check(t, activation, bn_after_activation, bn_eps, dtype);
  return empty({0}, ScalarType::Byte);
}

}  // namespace
}  // namespace fk::norm_act

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&fk::norm_act::run));
  m.impl("batch_norm_act_pack", TORCH_BOX(&fk::norm_act::pack_only));
  m.impl("batch_norm_act_statistics", TORCH_BOX(&fk::norm_act::statistics));
  m.impl("batch_norm_act_backward.native", TORCH_BOX(&fk::norm_act::backward));
}
