#include "depthwise_mlp_hidden.h"

namespace fk::mlp {
namespace {

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

}  // namespace

ChannelStatistics channel_statistics(const fk_array& x, int64_t images, int64_t skipped, int64_t rows, int64_t n) {
  std::vector<double> sums(static_cast<size_t>(images * 2 * n), 0.0);
  run_tasks(images, 0, [&](int64_t image, void*) {
    const float* from = static_cast<const float*>(x.data) + (image * (skipped + rows) + skipped) * n;
    double *sum = sums.data() + image * 2 * n, *squares = sum + n;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < n; ++c) sum[c] += from[i * n + c];
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < n; ++c) {
        const double d = from[i * n + c] - sum[c] / static_cast<double>(rows);
        squares[c] += d * d;
      }
  });
  ChannelStatistics found;
  for (int64_t c = 0; c < n; ++c) {
    const Merged of = merge(
        images, rows, [&](int64_t image) { return sums[image * 2 * n + c]; },
        [&](int64_t image) { return sums[image * 2 * n + n + c]; });
    found.mean.push_back(of.mean);
    found.variance.push_back(of.variance);
  }
  return found;
}

namespace {

// Means, then variances, of what the three batch norms meet in this batch, behind each other; zeros of absent ones.
Tensor run(TensorList t, std::string norm, double norm_eps, std::string hidden_activation, std::string activation,
           std::string inner_residual, bool bn_after_activation, std::vector<double> bn_eps, bool,
           std::optional<double> out_norm_eps, int64_t height, int64_t width, int64_t prefix, std::string,
           ScalarType dtype) {
  const Options o = {norm,       norm_eps,       hidden_activation,
                     activation, inner_residual, bn_after_activation,
                     bn_eps,     out_norm_eps,   height,
                     width,      prefix,         "none",
                     dtype};
  const Mlp m = check(t, std::nullopt, o);
  const int64_t total = 2 * m.hidden + m.out, pixels = height * width, panel = kernels().panel;
  Tensor out = empty({2, total}, ScalarType::Float);
  float *mean = static_cast<float*>(out.mutable_data_ptr()), *variance = mean + total;
  std::fill(mean, mean + 2 * total, 0.0f);
  if (m.batch == 0) return out;

  Memory memory;
  std::vector<float> groups;
  fk_depthwise_mlp_backward p = {};
  const Tensor block = describe_hidden(m, o, t, &memory, &groups, &p);
  const fk_table& k = kernels();
  const int64_t padded = blocks(m.hidden, panel) * panel;
  ChannelNorm norm1(m.bn[0], m.hidden, padded, true, &memory), norm2(m.bn[1], m.hidden, padded, true, &memory);
  p.norm1 = norm1.vectors;
  p.out = 0;
  p.stack = 1;
  p.chunk = std::min(padded, std::max<int64_t>(panel, 32));
  char sizing;
  p.store = &sizing;
  p.store_bytes = k.store_depthwise_mlp_backward(&p);
  p.store = memory.take<char>(m.batch * p.store_bytes);
  p.sums = memory.take<double>(m.batch * 2 * p.chunk);
  auto step = [&](int64_t index) {
    run_tasks(m.batch, 0, [&](int64_t image, void*) { k.depthwise_mlp_statistics(&p, index, image); });
  };
  auto take = [&](ChannelNorm* norm, int64_t first) {
    for (int64_t c = 0; c < std::min(p.chunk, m.hidden - p.first); ++c) {
      const Merged found = merge(
          m.batch, pixels, [&](int64_t image) { return p.sums[image * 2 * p.chunk + c]; },
          [&](int64_t image) { return p.sums[(image * 2 + 1) * p.chunk + c]; });
      mean[first + p.first + c] = static_cast<float>(found.mean);
      variance[first + p.first + c] = static_cast<float>(found.variance);
      norm->set_statistics(p.first + c, found.mean, found.variance);
    }
  };
  if (m.bn[0].present() || m.bn[1].present()) step(0);
  for (p.first = 0; (m.bn[0].present() || m.bn[1].present()) && p.first < m.hidden; p.first += p.chunk) {
    step(1);
    if (m.bn[0].present()) take(&norm1, 0);
    if (!m.bn[1].present()) continue;
    step(2);
    take(&norm2, m.hidden);
  }
  if (!m.bn[2].present()) return out;
  // The branch in front of the last norm, by a forward with the statistics found.
  TensorList inner = t;
  for (int i = 0; i < 2; ++i) {
    if (!m.bn[i].present()) continue;
    const size_t first = i ? kBn2 : kBn1;
    Tensor found[2] = {empty({m.hidden}, ScalarType::Float), empty({m.hidden}, ScalarType::Float)};
    std::copy(mean + i * m.hidden, mean + (i + 1) * m.hidden, static_cast<float*>(found[0].mutable_data_ptr()));
    std::copy(variance + i * m.hidden, variance + (i + 1) * m.hidden, static_cast<float*>(found[1].mutable_data_ptr()));
    inner[first + 2] = found[0];
    inner[first + 3] = found[1];
  }
  for (size_t i = kBn3; i < kBn3 + 4; ++i) inner[i].reset();
  for (size_t i : {kOutNormWeight, kOutNormBias, kResidual}) inner[i].reset();
  Options plain = o;
  plain.out_norm_eps = std::nullopt;
  const Outputs found = forward(inner, std::nullopt, plain, ScalarType::Float);
  const ChannelStatistics last = channel_statistics(view(found.out, "out"), m.batch, prefix, pixels, m.out);
  std::copy(last.mean.begin(), last.mean.end(), mean + 2 * m.hidden);
  std::copy(last.variance.begin(), last.variance.end(), variance + 2 * m.hidden);
  return out;
}

}  // namespace
}  // namespace fk::mlp

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) { m.impl("depthwise_mlp_statistics", TORCH_BOX(&fk::mlp::run)); }
