// What the kernels around the hidden map of depthwise_mlp need to know: for its backward and for batch statistics.
#pragma once

#include "channel_norm.h"
#include "depthwise_mlp.h"

namespace fk::mlp {

// Fills in sizes, activations, the norm of x, the first linear and the filter. The result holds packed weights;
// `groups` and `memory` hold the rest. What was `kept` needs no first linear, of which only the sizes are there then.
Tensor describe_hidden(const Mlp& m, const Options& o, const TensorList& t, Memory* memory, std::vector<float>* groups,
                       fk_depthwise_mlp_backward* p, bool kept = false);

// What a forward with batch statistics keeps for the backward, whatever the lanes of a vector; and that the kernels
// read or write it.
std::vector<int64_t> kept_shape(const Mlp& m, int64_t pixels);
void take_kept(const Mlp& m, const Options& o, const Tensor& kept, fk_depthwise_mlp_backward* p);
// The branch in front of its batch norm [B, H * W, N], checked.
fk_array branch_view(const Tensor& branch, const Mlp& m, int64_t pixels);

// Hidden channels at a time. Splitting rows into parts pays the better the more panels they meet.
constexpr int64_t kHiddenChunk = 64, kHiddenChunkInParts = 128;

// Memory for each image or stack of them.
std::vector<char*> take_stores(int64_t count, int64_t bytes, Memory* memory);

// Mean and biased variance of a channel over images, from each image's sum and squares around its own mean.
struct Merged {
  double mean, variance;
};
template <class Sum, class Squares>
Merged merge(int64_t images, int64_t pixels, const Sum& sum, const Squares& squares) {
  const double n = static_cast<double>(pixels);
  double count = 0.0, mean = 0.0, total = 0.0;
  for (int64_t image = 0; image < images; ++image) {
    const double delta = sum(image) / n - mean, both = count + n;
    mean += delta * n / both;
    total += squares(image) + delta * delta * count * n / both;
    count = both;
  }
  return {mean, total / count};
}

}  // namespace fk::mlp
