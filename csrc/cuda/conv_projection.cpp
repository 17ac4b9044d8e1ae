#include <tuple>

#include "support.h"

namespace fk {
namespace {

constexpr size_t kBranches = 3;
enum Index { kX, kNormWeight, kNormBias, kFirstBranch };
enum BranchIndex { kFilter, kBnWeight, kBnBias, kBnMean, kBnVariance, kWeight, kBias, kPerBranch };

// What a multiprocessor of a GPU that this is for does in the time in which it reads one byte from the L2 cache.
constexpr double kProductsPerByte = 64.0, kFp32ProductsPerByte = 6.0;
// What a block costs besides, in such bytes: it fills its pipelines and waits at barriers.
constexpr double kBytesOfBlock = 32 * 1024;
// A block that is alone on its multiprocessor has nobody to work while it waits.
constexpr double kAlone = 1.3;
constexpr int32_t kSides[] = {16, 14, 8, 7, 4, 2, 1};

// The cost of a set's blocks for a sample, in bytes.
struct Cost {
  double block, sample;
};

Cost cost_of(const ConvProjection& p, const ProjectionSet& set, int64_t shared, int64_t most) {
  const double size = static_cast<double>(size_of(p.dtype)), channels = p.channels;
  const double patch = double(std::min(set.patch_height, p.height)) * std::min(set.patch_width, p.width);
  // The statistics of more channels than are filtered at a time take a pass of their own.
  double bytes = patch * channels * size * (p.norm.kind == kNoNorm || channels <= kFilteredChannels ? 1 : 2),
         products = 0;
  for (int32_t i = set.first; i < set.first + set.count; ++i) {
    const ProjectionBranch& b = p.branches[i];
    bytes += b.linear.out * channels * size;
    products += double(projected_rows(b)) * b.linear.out * channels;
  }
  const double work = products / (p.dtype == kF32 ? kFp32ProductsPerByte : kProductsPerByte);
  const bool alone = 2 * (shared + kReservedShared) > most + kReservedShared;
  const double block = (bytes + work + kBytesOfBlock) * (alone ? kAlone : 1.0);
  return {block, block * set.down * set.across};
}

// The cheapest tiles of the set's branches whose blocks find room in shared memory; none: no cost.
std::optional<Cost> choose_tiles(ConvProjection& p, ProjectionSet& set, int64_t most) {
  ProjectionBranch* branches = p.branches + set.first;
  const int64_t busy = 2 * std::max<int64_t>(multiprocessors(), 1);
  std::optional<Cost> best;
  ProjectionSet best_set = set;
  double best_time = 0;
  const auto divide = [&] {
    for (int32_t i = 0; i < set.count; ++i) {
      branches[i].tile_height = parts(branches[i].out_height, set.down);
      branches[i].tile_width = parts(branches[i].out_width, set.across);
    }
  };
  for (const int32_t tall : kSides)
    for (const int32_t wide : kSides) {
      set.down = parts(branches->out_height, tall);
      set.across = parts(branches->out_width, wide);
      divide();
      const bool fits = std::all_of(branches, branches + set.count, [](const ProjectionBranch& b) {
        return b.tile_height * b.tile_width <= kMostProjected;
      });
      if (!fits) continue;
      measure_patch(p, set);
      const int64_t shared = shared_bytes(p, set);
      if (shared > most) continue;
      const Cost cost = cost_of(p, set, shared, most);
      const double time = std::max(cost.sample * p.batch, cost.block * busy);
      if (best && best_time <= time) continue;
      best = cost;
      best_set = set;
      best_time = time;
    }
  set = best_set;
  if (best) divide();
  return best;
}

// Which branches share blocks, and how large these are.
void choose_sets(ConvProjection& p) {
  const int64_t most = most_shared_memory();
  const int64_t busy = 2 * std::max<int64_t>(multiprocessors(), 1);
  constexpr int32_t kCounts[3][3] = {{3, 0, 0}, {1, 2, 0}, {1, 1, 1}};
  ConvProjection best = p;
  double best_time = 0;
  for (const auto& counts : kCounts) {
    p.sets = 0;
    double all = 0, longest = 0;
    int32_t first = 0;
    bool fits = true;
    for (int32_t i = 0; i < 3 && counts[i] && fits; ++i) {
      ProjectionSet& set = p.set[p.sets++];
      set = {first, counts[i], 1, 1, 0, 0};
      first += counts[i];
      const std::optional<Cost> cost = choose_tiles(p, set, most);
      fits = cost.has_value();
      if (!fits) break;
      all += cost->sample * p.batch;
      longest = std::max(longest, cost->block * busy);
    }
    const double time = std::max(all, longest);
    if (!fits || (best.sets && best_time <= time)) continue;
    best = p;
    best_time = time;
  }
  p = best;
  if (p.sets) return;
  // Not even one result of each branch alone.
  p.sets = 3;
  for (int32_t i = 0; i < p.sets; ++i) {
    ProjectionBranch& b = p.branches[i];
    p.set[i] = {i, 1, b.out_height, b.out_width, 0, 0};
    b.tile_height = b.tile_width = 1;
    measure_patch(p, p.set[i]);
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
  choose_sets(p);
  stream.run(p);
  return {outs[0], outs[1], outs[2]};
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(FK_LIBRARY, FK_DISPATCH_KEY, m) { m.impl("conv_projection", TORCH_BOX(&fk::run)); }
