#include <cstring>
#include <tuple>

#include "depthwise_mlp_hidden.h"

namespace fk::mlp {
namespace {

// Pixels that the second linear takes at a time, and an upper bound of a vector's lanes.
constexpr int64_t kBandPixels = 256, kMostLanes = 16;

// The branch in front of its batch norm is what a call goes on from, unless more than that norm lies behind it.
bool goes_on(const Mlp& m, const Options& o) {
  return m.bn[2].present() && !o.out_norm_eps.has_value() && o.summary != "statistics";
}

// Means, then variances, of what the three batch norms meet in this batch, behind each other; zeros of absent ones. And
// what the call goes on from: the branch in front of its batch norm, and with `keep`, for the gradients, what the first
// linear gave. What is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor> run(TensorList t, std::string norm, double norm_eps, std::string hidden_activation,
                                       std::string activation, std::string inner_residual, bool bn_after_activation,
                                       std::vector<double> bn_eps, bool, std::optional<double> out_norm_eps,
                                       int64_t height, int64_t width, int64_t prefix, std::string summary,
                                       ScalarType dtype, bool keep) {
  const Options o = {
      norm,  norm_eps, hidden_activation, activation, inner_residual, bn_after_activation, bn_eps, out_norm_eps, height,
      width, prefix,   summary,           dtype};
  const Mlp m = check(t, std::nullopt, o);
  const int64_t total = 2 * m.hidden + m.out, pixels = height * width, panel = kernels().panel;
  Tensor out = empty({2, total}, ScalarType::Float), branch = no_statistics(), kept = no_statistics();
  float *mean = static_cast<float*>(out.mutable_data_ptr()), *variance = mean + total;
  std::fill(mean, mean + 2 * total, 0.0f);
  if (goes_on(m, o)) {
    branch = empty({m.batch, pixels, m.out}, ScalarType::Float);
    if (keep) kept = empty(kept_shape(m, pixels), o.dtype);
  }
  if (m.batch == 0) return {out, kept, branch};

  Memory memory;
  std::vector<float> groups;
  fk_depthwise_mlp_backward p = {};
  const Tensor block = describe_hidden(m, o, t, &memory, &groups, &p);
  const fk_table& k = kernels();
  const int64_t padded = blocks(m.hidden, panel) * panel, padded_out = blocks(m.out, panel) * panel;
  Tensor packed = no_statistics();
  if (m.bn[2].present()) {
    packed = pack_once([&](Packer& packer) {
      p.project = packer.linear(m.project, m.project_bias, m.out, m.hidden, m.low_precision);
    });
    p.branch =
        goes_on(m, o) ? static_cast<float*>(branch.mutable_data_ptr()) : memory.take<float>(m.batch * pixels * m.out);
  }
  if (kept.numel()) {
    take_kept(m, o, kept, &p);
    // No vector reaches the last channels where vectors are short.
    const int64_t all = kept.size(1), written = blocks(m.hidden, k.lanes) * k.lanes,
                  plane = pixels * kept.element_size();
    for (int64_t image = 0; image < m.batch; ++image)
      std::memset(static_cast<char*>(p.kept) + (image * all + written) * plane, 0,
                  static_cast<size_t>((all - written) * plane));
  }
  ChannelNorm norm1(m.bn[0], m.hidden, padded, true, &memory), norm2(m.bn[1], m.hidden, padded, true, &memory);
  p.norm1 = norm1.vectors;
  p.norm2 = norm2.vectors;
  static_assert(kHiddenChunk <= FK_MOST_STATISTICS_CHUNK && kHiddenChunkInParts <= FK_MOST_STATISTICS_CHUNK);
  p.chunk = std::min(padded, std::max(panel, p.expand.parts ? kHiddenChunkInParts : kHiddenChunk));
  p.rows = std::max(p.chunk, padded_out);
  p.rows_per_band = std::max<int64_t>(1, kBandPixels / width);
  const std::vector<char*> stores = take_stores(m.batch, k.store_depthwise_mlp_statistics(&p), &memory);
  p.stores = stores.data();
  p.sums = memory.take<double>(m.batch * 2 * p.rows);
  auto step = [&](int64_t index) {
    run_tasks(m.batch, k.scratch_depthwise_mlp_statistics(&p),
              [&](int64_t image, void* scratch) { k.depthwise_mlp_statistics(&p, index, image, scratch); });
  };
  // Writes the statistics of `n` channels and calls `body` with them.
  auto take = [&](int64_t first, int64_t n, const auto& body) {
    for (int64_t c = 0; c < n; ++c) {
      const Merged found = merge(
          m.batch, pixels, [&](int64_t image) { return p.sums[image * 2 * p.rows + c]; },
          [&](int64_t image) { return p.sums[(image * 2 + 1) * p.rows + c]; });
      mean[first + c] = static_cast<float>(found.mean);
      variance[first + c] = static_cast<float>(found.variance);
      body(c, found);
    }
  };
  step(0);
  for (p.first = 0; p.first < m.hidden; p.first += p.chunk) {
    const int64_t n = std::min(p.chunk, m.hidden - p.first);
    const auto into = [&](ChannelNorm* to) {
      return [&, to](int64_t c, const Merged& of) { to->set_statistics(p.first + c, of.mean, of.variance); };
    };
    step(1);
    if (m.bn[0].present()) take(p.first, n, into(&norm1));
    if (!m.bn[1].present() && !p.branch) continue;
    step(2);
    if (m.bn[1].present()) take(m.hidden + p.first, n, into(&norm2));
    if (p.branch) step(3);
  }
  if (!p.branch) return {out, kept, branch};
  step(4);
  take(2 * m.hidden, m.out, [](int64_t, const Merged&) {});
  return {out, kept, branch};
}

// The call from the branch in front of its batch norm on.
std::tuple<Tensor, Tensor> finish(TensorList t, Tensor branch, std::string norm, double norm_eps,
                                  std::string hidden_activation, std::string activation, std::string inner_residual,
                                  bool bn_after_activation, std::vector<double> bn_eps, bool,
                                  std::optional<double> out_norm_eps, int64_t height, int64_t width, int64_t prefix,
                                  std::string summary, ScalarType dtype) {
  const Options o = {
      norm,  norm_eps, hidden_activation, activation, inner_residual, bn_after_activation, bn_eps, out_norm_eps, height,
      width, prefix,   summary,           dtype};
  const Mlp m = check(t, std::nullopt, o);
  STD_TORCH_CHECK(goes_on(m, o), "branch: expected a batch norm and nothing else behind it");
  const int64_t pixels = height * width;
  Memory memory;
  const ChannelNorm last(m.bn[2], m.out, blocks(m.out, kernels().panel) * kernels().panel, true, &memory);
  const ScalarType out_dtype = promoted(o.dtype, t[kResidual]);
  Tensor out = empty({m.batch, m.tokens, m.out}, out_dtype);
  const bool wants_mean = o.summary == "mean";
  Tensor means = wants_mean ? empty({m.batch, m.out}, ScalarType::Float) : no_statistics();
  fk_batch_norm_rows p = {};
  p.raw = static_cast<const float*>(branch_view(branch, m, pixels).data);
  p.norm = last.vectors;
  p.residual = view(t[kResidual], "residual", {m.batch, m.tokens, m.out});
  p.out = out.mutable_data_ptr();
  p.out_dtype = kernel_dtype(out_dtype);
  p.rows = pixels;
  p.skipped = prefix;
  p.columns = m.out;
  p.rows_per_task = kMomentRows;
  p.tasks_per_image = blocks(pixels, kMomentRows);
  std::vector<double> sums(static_cast<size_t>(wants_mean ? m.batch * p.tasks_per_image * m.out : 0));
  p.means = wants_mean ? sums.data() : nullptr;
  run_tasks(m.batch * p.tasks_per_image, (m.out + kMostLanes) * 4,
            [&](int64_t task, void* scratch) { kernels().batch_norm_rows(&p, task, scratch); });
  for (int64_t i = 0; wants_mean && i < m.batch * m.out; ++i) {
    double total = 0.0;
    for (int64_t task = 0; task < p.tasks_per_image; ++task)
      total += sums[(i / m.out * p.tasks_per_image + task) * m.out + i % m.out];
    static_cast<float*>(means.mutable_data_ptr())[i] = static_cast<float>(total / static_cast<double>(pixels));
  }
  return {out, means};
}

}  // namespace
}  // namespace fk::mlp

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("depthwise_mlp_statistics", TORCH_BOX(&fk::mlp::run));
  m.impl("depthwise_mlp_finish", TORCH_BOX(&fk::mlp::finish));
}
