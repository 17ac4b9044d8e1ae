#include <tuple>

#include "support.h"

namespace fk {
namespace {

constexpr size_t kBranches = 3;
enum Index { kX, kNormWeight, kNormBias, kFirstBranch };
enum BranchIndex { kFilter, kBnWeight, kBnBias, kBnMean, kBnVariance, kWeight, kBias, kPerBranch };

// The largest tiles whose block finds room in shared memory, which the three branches share.
void choose_tiles(ConvProjection& p) {
  const int64_t most = most_shared_memory();
  for (int64_t rows = kMostProjectionRows; rows > 0; rows /= 2) {
    for (ProjectionBranch& b : p.branches) {
      int64_t side = kMostSide;
      const auto patch = [&] { return (side - 1) * b.stride + b.kernel; };
      while (side > 1 && patch() * patch() > rows) --side;
      b.tile_height = tile_side(b.out_height, side);
      b.tile_width = tile_side(b.out_width, side);
    }
    if (shared_bytes(p) <= most) return;
  }
  check_shared_memory(shared_bytes(p));
}

std::tuple<Tensor, Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::optional<double> norm_eps,
                                       std::vector<double> bn_eps, bool bn_training, int64_t height, int64_t width,
                                       int64_t prefix, std::vector<int64_t> strides, std::vector<int64_t> paddings,
                                       ScalarType dtype) {
  check_count(t, kFirstBranch + kBranches * kPerBranch);
  STD_TORCH_CHECK(!packed.has_value(), "packed: the CUDA kernels read the weights themselves");
  const Tensor& x = required(t, kX, "x");
  check_tokens(x);
  STD_TORCH_CHECK(!bn_training, "bn_training: the CUDA kernels take running statistics");
  STD_TORCH_CHECK(bn_eps.size() == kBranches && strides.size() == kBranches && paddings.size() == kBranches,
                  "bn_eps, stride, padding: expected one for each branch");
  check_grid(x.size(1), prefix, height, width);
  const int64_t batch = x.size(0), channels = x.size(2);
  STD_TORCH_CHECK(batch * prefix < (int64_t{1} << 30), "x: expected less than 2^30 prefix tokens in all");

  ConvProjection p = {};
  Views views(x, dtype);
  const Stream stream(x);
  p.dtype = kernel_dtype(dtype);
  p.batch = static_cast<int32_t>(batch);
  p.height = static_cast<int32_t>(height);
  p.width = static_cast<int32_t>(width);
  p.channels = static_cast<int32_t>(channels);
  p.prefix = static_cast<int32_t>(prefix);
  p.x = views.array(x, "x", {batch, x.size(1), channels});
  p.norm.kind = norm_eps.has_value() ? kLayerNorm : kNoNorm;
  p.norm.eps = static_cast<float>(norm_eps.value_or(0.0));
  p.norm.weight = views.array(t[kNormWeight], "norm_weight", {channels});
  p.norm.bias = views.array(t[kNormBias], "norm_bias", {channels});
  std::vector<Tensor> outs;
  for (size_t i = 0; i < kBranches; ++i) {
    const std::optional<Tensor>* own = &t[kFirstBranch + i * kPerBranch];
    STD_TORCH_CHECK(
        own[kFilter].has_value() && own[kFilter]->dim() == 4 && own[kWeight].has_value() && own[kWeight]->dim() == 2,
        "branch: expected a filter and a weight");
    ProjectionBranch& b = p.branches[i];
    const int64_t kernel = own[kFilter]->size(2), stride = strides[i], padding = paddings[i];
    STD_TORCH_CHECK(kernel > 0 && kernel <= 7 && stride > 0 && stride <= 16 && padding >= 0 && padding <= 64,
                    "branch: expected a filter of 1 to 7, a stride of at most 16 and a padding of at most 64");
    const int64_t out_height = (height + 2 * padding - kernel) / stride + 1;
    const int64_t out_width = (width + 2 * padding - kernel) / stride + 1;
    STD_TORCH_CHECK(height + 2 * padding >= kernel && width + 2 * padding >= kernel,
                    "branch: the filter is larger than the padded map");
    STD_TORCH_CHECK(out_height * out_width < (int64_t{1} << 30), "branch: expected less than 2^30 results of a sample");
    const int64_t out = own[kWeight]->size(0);
    STD_TORCH_CHECK(out > 0 && out <= 384, "branch: expected a weight of 1 to 384 rows");
    b.filter = views.array(own[kFilter], "conv_weight", {channels, 1, kernel, kernel});
    STD_TORCH_CHECK(own[kBnMean].has_value() == own[kBnVariance].has_value(),
                    "bn: expected a mean and a variance, or none");
    b.norm = {views.array(own[kBnWeight], "bn.weight", {channels}), views.array(own[kBnBias], "bn.bias", {channels}),
              views.array(own[kBnMean], "bn.running_mean", {channels}),
              views.array(own[kBnVariance], "bn.running_var", {channels}), static_cast<float>(bn_eps[i])};
    b.linear = views.linear(own[kWeight], own[kBias], "weight", out, channels);
    b.kernel = static_cast<int32_t>(kernel);
    b.stride = static_cast<int32_t>(stride);
    b.padding = static_cast<int32_t>(padding);
    b.out_height = static_cast<int32_t>(out_height);
    b.out_width = static_cast<int32_t>(out_width);
    outs.push_back(empty(x, {batch, prefix + out_height * out_width, out}, dtype));
    b.out = outs.back().mutable_data_ptr();
  }
  p.vectors = views.vectors({channels});
  choose_tiles(p);
  stream.run(p);
  return {outs[0], outs[1], outs[2]};
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(FK_LIBRARY, FK_DISPATCH_KEY, m) { m.impl("conv_projection", TORCH_BOX(&fk::run)); }
