// Batch normalisation of a vector of channels, and its backward.
#pragma once

#include "vec.h"

namespace {

struct NormVectors {
  bool present;
  vf mean, rstd, rest, weight, bias, grad_mean, grad_slope;
};
FK_INLINE NormVectors norm_vectors(const struct fk_channel_norm& n, int64_t at) {
  NormVectors v;
  v.present = n.mean;
  v.mean = v.rstd = v.rest = v.weight = v.bias = v.grad_mean = v.grad_slope = splat(0.0f);
  if (!v.present) return v;
  v.mean = load(n.mean + at);
  v.rstd = load(n.rstd + at);
  v.rest = load(n.rest + at);
  v.weight = load(n.weight + at);
  v.bias = load(n.bias + at);
  if (n.grad_mean) {
    v.grad_mean = load(n.grad_mean + at);
    v.grad_slope = load(n.grad_slope + at);
  }
  return v;
}
// An error of the scale, small as it is, would be the same at every pixel and not average out.
FK_INLINE vf normalized(const NormVectors& n, vf x) {
  const vf d = x - n.mean;
  return d * n.rstd + d * n.rest;
}
// The gradient of a norm's input.
FK_INLINE vf norm_input_grad(const NormVectors& n, vf grad, vf hat) {
  return n.weight * n.rstd * (grad - (n.grad_mean + hat * n.grad_slope));
}

}  // namespace
