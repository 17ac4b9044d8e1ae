#include <algorithm>
#include <tuple>

#include "support.h"

namespace fk {
namespace {

constexpr size_t kBranches = 3;
enum Index { kX, kNormWeight, kNormBias, kFirstBranch };
enum BranchIndex { kFilter, kBnWeight, kBnBias, kBnMean, kBnVariance, kWeight, kBias, kPerBranch };

// The last plans of this thread: making one takes longer than a launch.
class Plans {
 public:
  void apply(ConvProjection& p) {
    const int64_t most = most_shared_memory(), processors = multiprocessors();
    std::vector<int64_t> key = {most,     processors, p.dtype, p.norm.kind, p.batch,
                                p.prefix, p.height,   p.width, p.channels};
    for (const ProjectionBranch& b : p.branches) key.insert(key.end(), {b.kernel, b.stride, b.padding, b.linear.out});
    const auto known = std::find_if(plans_.begin(), plans_.end(), [&](const Plan& plan) { return plan.key == key; });
    if (known != plans_.end()) {
      p.sets = known->sets;
      std::copy_n(known->set, kBranches, p.set);
      for (size_t i = 0; i < kBranches; ++i) {
        p.branches[i].tile_height = known->tiles[i][0];
        p.branches[i].tile_width = known->tiles[i][1];
      }
      return;
    }
    choose_sets(p, most, processors);
    Plan plan = {std::move(key), p.sets, {}, {}};
    std::copy_n(p.set, kBranches, plan.set);
    for (size_t i = 0; i < kBranches; ++i) {
      plan.tiles[i][0] = p.branches[i].tile_height;
      plan.tiles[i][1] = p.branches[i].tile_width;
    }
    if (plans_.size() == kMost) plans_.erase(plans_.begin());
    plans_.push_back(std::move(plan));
  }

 private:
  static constexpr size_t kMost = 16;
  struct Plan {
    std::vector<int64_t> key;
    int32_t sets;
    ProjectionSet set[kBranches];
    int32_t tiles[kBranches][2];
  };
  std::vector<Plan> plans_;
};

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
    STD_TORCH_CHECK(out > 0, "branch: expected a weight of at least one row");
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
  static thread_local Plans plans;
  plans.apply(p);
  check_shared_memory(shared_bytes(p));
  stream.run(p);
  return {outs[0], outs[1], outs[2]};
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(FK_LIBRARY, FK_DISPATCH_KEY, m) { m.impl("conv_projection", TORCH_BOX(&fk::run)); }
