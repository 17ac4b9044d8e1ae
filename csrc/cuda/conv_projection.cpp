#include <tuple>

#include "support.h"

namespace fk {
namespace {

constexpr size_t kBranches = 3;
enum Index { kX, kNormWeight, kNormBias, kFirstBranch };
enum BranchIndex { kFilter, kBnWeight, kBnBias, kBnMean, kBnVariance, kWeight, kBias, kPerBranch };

std::tuple<Tensor, Tensor, Tensor> run(TensorList t, std::optional<Tensor> packed, std::optional<double> norm_eps,
                                       std::vector<double> bn_eps, bool bn_training, int64_t height, int64_t width,
                                       int64_t prefix, std::vector<int64_t> strides, std::vector<int64_t> paddings,
                                       ScalarType dtype) {
  check_count(t, kFirstBranch + kBranches * kPerBranch);
  STD_TORCH_CHECK(!packed.has_value(), "packed: the CUDA kernels read the weights themselves");
  const Tensor& x = required(t, kX, "x");
  STD_TORCH_CHECK(x.dim() == 3 && on_device(x), "x: expected 3 dimensions on a CUDA device");
  STD_TORCH_CHECK(!bn_training, "bn_training: the CUDA kernels take running statistics");
  STD_TORCH_CHECK(bn_eps.size() == kBranches && strides.size() == kBranches && paddings.size() == kBranches,
                  "bn_eps, stride, padding: expected one for each branch");
  STD_TORCH_CHECK(height > 0 && width > 0 && prefix >= 0 && height < (int64_t{1} << 31) / width &&
                      prefix + height * width == x.size(1) && x.size(1) < (int64_t{1} << 31),
                  "grid: does not make the tokens of x");
  const int64_t batch = x.size(0), channels = x.size(2);
  STD_TORCH_CHECK(channels > 0 && channels < (int64_t{1} << 24), "x: unexpected number of channels");

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
    int64_t side = kMostSide;
    while (((side - 1) * stride + kernel) * ((side - 1) * stride + kernel) > kMostProjectionRows) --side;
    b.tile_height = tile_side(out_height, side);
    b.tile_width = tile_side(out_width, side);
    outs.push_back(empty(x, {batch, prefix + out_height * out_width, out}, dtype));
    b.out = outs.back().mutable_data_ptr();
  }
  p.vectors = views.vectors({channels});
  STD_TORCH_CHECK(shared_bytes(p) <= kMostShared, "conv_projection: a block needs ", shared_bytes(p),
                  " bytes of shared memory, and has at most ", kMostShared);
  stream.run(p);
  return {outs[0], outs[1], outs[2]};
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(FK_LIBRARY, FK_DISPATCH_KEY, m) { m.impl("conv_projection", TORCH_BOX(&fk::run)); }
