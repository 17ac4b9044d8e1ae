// Batch normalisation of the channels of rows and an activation, one behind the other in either order.
//
// A step at a time: the batch's moments, the result, the sums of its gradients, and the gradient of x.
#pragma once

#include "activations.h"
#include "channel_norm.h"
#include "depthwise_mlp_statistics.h"

namespace {

// Rows whose sums are added in fp32 before they join those of a task.
constexpr int64_t kSummedRows = 16;

// A value behind both, and what its gradient needs.
template <bool ActivationFirst, bool Low, fk_activation Activation>
struct NormAct {
  NormVectors norm;
  bool of_batch;

  // Running statistics leave an infinite value as it is.
  inline __attribute__((always_inline)) vf normed(vf x) const {
    return of_batch ? normalized(norm, x) : (x - norm.mean) * norm.rstd;
  }
  inline __attribute__((always_inline)) vf result(vf x) const {
    if (ActivationFirst) return normed(activate<Low, Activation>(x)) * norm.weight + norm.bias;
    return activate<Low, Activation>(normed(x) * norm.weight + norm.bias);
  }
  // Takes a gradient of the result to right behind the norm; `slope` is the activation's, where that comes first.
  inline __attribute__((always_inline)) vf behind_norm(vf x, vf grad, vf* hat, vf* slope) const {
    if (ActivationFirst) {
      *hat = normed(activate<Low, Activation>(x, slope));
      return grad;
    }
    *hat = normed(x);
    activate<Low, Activation>(*hat * norm.weight + norm.bias, slope);
    return grad * *slope;
  }
  inline __attribute__((always_inline)) vf input_grad(vf x, vf grad) const {
    vf hat, slope;
    const vf behind = behind_norm(x, grad, &hat, &slope);
    const vf in_front = norm_input_grad(norm, behind, hat);
    return ActivationFirst ? in_front * slope : in_front;
  }
};

// The rows of a task, from the first of up to a vector of channels on.
struct NormActRows {
  int64_t first, count, lanes;
};

template <class T>
FK_INLINE void store_lanes(T* to, vf x, int64_t lanes) {
  lanes < FK_VL ? store_tail(to, x, lanes) : store(to, x);
}

template <class X, bool Low, fk_activation Activation>
static __attribute__((noinline)) void norm_act_moments(const struct fk_batch_norm_act& p, int64_t task,
                                                       const NormActRows& r, int64_t n, float* column) {
  const X* x = (const X*)p.x.data + r.first + n;
  for (int64_t i = 0; i < r.count; ++i)
    store(column + i * FK_VL, activate<Low, Activation>(load_lanes(x + i * p.columns, r.lanes)));
  const int64_t width = r.count % kSummedRows ? 1 : kSummedRows;
  double* sums = p.sums + task * 2 * p.columns + n;
  pixel_moments(column, FK_VL, width * FK_VL, r.count / width, width, r.lanes, sums, sums + p.columns);
}

template <class X, class Out, class Value>
FK_INLINE void norm_act_rows(const struct fk_batch_norm_act& p, const NormActRows& r, int64_t n, const Value& value) {
  const X* x = (const X*)p.x.data + r.first + n;
  Out* out = (Out*)p.out + r.first + n;
  for (int64_t i = 0; i < r.count; ++i)
    store_lanes(out + i * p.columns, value.result(load_lanes(x + i * p.columns, r.lanes)), r.lanes);
}

template <class X, class Grad, class Value>
FK_INLINE void norm_act_input(const struct fk_batch_norm_act& p, const NormActRows& r, int64_t n, const Value& value) {
  const X* x = (const X*)p.x.data + r.first + n;
  const Grad* grad = (const Grad*)p.grad.data + r.first + n;
  X* out = (X*)p.out + r.first + n;
  for (int64_t i = 0; i < r.count; ++i) {
    const int64_t at = i * p.columns;
    store_lanes(out + at, value.input_grad(load_lanes(x + at, r.lanes), load_lanes(grad + at, r.lanes)), r.lanes);
  }
}

template <class X, class Grad, class Value>
FK_INLINE void norm_act_sums(const struct fk_batch_norm_act& p, int64_t task, const NormActRows& r, int64_t n,
                             const Value& value) {
  const X* x = (const X*)p.x.data + r.first + n;
  const Grad* grad = (const Grad*)p.grad.data + r.first + n;
  vf alone = splat(0.0f), times = splat(0.0f), values = splat(0.0f);
  for (int64_t first = 0; first < r.count; first += kSummedRows) {
    vf own_alone = splat(0.0f), own_times = splat(0.0f), own_values = splat(0.0f);
    for (int64_t i = first; i < min64(r.count, first + kSummedRows); ++i) {
      vf hat, slope;
      const vf g = value.behind_norm(load_lanes(x + i * p.columns, r.lanes), load_lanes(grad + i * p.columns, r.lanes),
                                     &hat, &slope);
      own_alone += g;
      own_times += g * hat;
      own_values += hat;
    }
    alone += own_alone;
    times += own_times;
    values += own_values;
  }
  float found[3][FK_VL] __attribute__((aligned(64)));
  store(found[0], alone);
  store(found[1], times);
  store(found[2], values);
  for (int64_t k = 0; k < 3; ++k)
    for (int64_t i = 0; i < r.lanes; ++i) p.sums[(task * 3 + k) * p.columns + n + i] = found[k][i];
}

template <class X, class Out, bool ActivationFirst, fk_activation Activation>
static __attribute__((noinline)) void norm_act_step(const struct fk_batch_norm_act& p, fk_norm_act_step step,
                                                    int64_t task, const NormActRows& r, int64_t n) {
  const NormAct<ActivationFirst, sizeof(Out) == 2, Activation> value = {norm_vectors(p.norm, n),
                                                                        p.norm.grad_mean != nullptr};
  if (step == FK_NORM_ACT_RESULT) return norm_act_rows<X, Out>(p, r, n, value);
  if (step == FK_NORM_ACT_INPUT) return norm_act_input<X, Out>(p, r, n, value);
  norm_act_sums<X, Out>(p, task, r, n, value);
}

template <class X, class Out>
FK_INLINE void norm_act_task(const struct fk_batch_norm_act& p, fk_norm_act_step step, int64_t task, float* scratch) {
  const int64_t row = task * p.rows_per_task, count = min64(p.rows_per_task, p.rows - row);
  with_activation(p.activation, [&](auto activation) {
    constexpr fk_activation kActivation = decltype(activation)::value;
    for (int64_t n = 0; n < p.columns; n += FK_VL) {
      const NormActRows r = {row * p.columns, count, min64(FK_VL, p.columns - n)};
      if (step == FK_NORM_ACT_MOMENTS)
        p.activation_first ? norm_act_moments<X, sizeof(Out) == 2, kActivation>(p, task, r, n, scratch)
                           : norm_act_moments<X, false, FK_NO_ACTIVATION>(p, task, r, n, scratch);
      else
        p.activation_first ? norm_act_step<X, Out, true, kActivation>(p, step, task, r, n)
                           : norm_act_step<X, Out, false, kActivation>(p, step, task, r, n);
    }
  });
}

int64_t scratch_batch_norm_act(const struct fk_batch_norm_act* p) { return p->rows_per_task * FK_VL * 4; }

void batch_norm_act(const struct fk_batch_norm_act* p, enum fk_norm_act_step step, int64_t task, void* scratch) {
  const bool wide = p->x.dtype == FK_F32;
  if (p->out_dtype == FK_F32)
    wide ? norm_act_task<float, float>(*p, step, task, (float*)scratch)
         : norm_act_task<bf16, float>(*p, step, task, (float*)scratch);
  else
    wide ? norm_act_task<float, bf16>(*p, step, task, (float*)scratch)
         : norm_act_task<bf16, bf16>(*p, step, task, (float*)scratch);
}

}  // namespace
