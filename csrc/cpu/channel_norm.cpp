#include "channel_norm.h"

#include <cmath>

namespace fk {

constexpr int64_t kVectors = 7;

ChannelNorm::ChannelNorm(const BatchNorm& bn, int64_t n, int64_t padded, bool of_batch, Memory* memory)
    : eps(bn.eps), padded(padded) {
  if (!bn.present()) return;
  float* values = memory->take<float>(kVectors * padded);
  std::fill(values, values + kVectors * padded, 0.0f);
  mean = values;
  rstd = values + padded;
  rest = values + 6 * padded;
  if (of_batch) {
    grad_mean = values + 4 * padded;
    grad_slope = values + 5 * padded;
  }
  for (int64_t c = 0; c < n; ++c) {
    set_statistics(c, element(bn.mean, c), element(bn.var, c));
    values[2 * padded + c] = bn.weight.data ? element(bn.weight, c) : 1.0f;
    values[3 * padded + c] = bn.bias.data ? element(bn.bias, c) : 0.0f;
  }
  vectors = {mean, rstd, values + 2 * padded, values + 3 * padded, rest, grad_mean, grad_slope};
}

void ChannelNorm::set_statistics(int64_t channel, double of, double variance) {
  mean[channel] = static_cast<float>(of);
  const double exact = 1.0 / std::sqrt(variance + eps);
  rstd[channel] = static_cast<float>(exact);
  // Batch statistics without variance and eps have no finite one; running ones need none.
  if (grad_mean && std::isfinite(exact)) rest[channel] = static_cast<float>(exact - rstd[channel]);
}

void ChannelNorm::set_gradients(const std::vector<double>& alone, const std::vector<double>& times,
                                const std::vector<double>& values, double count) {
  for (size_t c = 0; c < alone.size(); ++c) {
    const double centre = values[c] / count, slope = times[c] / count - centre * alone[c] / count;
    grad_mean[c] = static_cast<float>(alone[c] / count - centre * slope);
    grad_slope[c] = static_cast<float>(slope);
  }
}

void ChannelNorm::repeat(int64_t n, int64_t columns) {
  for (float* vector = mean; vector < mean + kVectors * padded; vector += padded)
    for (int64_t c = n; c < columns; ++c) vector[c] = vector[c - n];
}

}  // namespace fk
