#include "packed.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fk {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int kSamples = 8;

uint64_t mix(uint64_t state, uint64_t value) {
  state = (state ^ value) * 0x9e3779b97f4a7c15ull;
  return state ^ (state >> 29);
}

// Where a tensor of any layout keeps its element of this row-major index.
int64_t offset(const Tensor& tensor, int64_t index) {
  int64_t at = 0;
  for (int64_t axis = tensor.dim(); axis-- > 0; index /= tensor.size(axis))
    at += index % tensor.size(axis) * tensor.stride(axis);
  return at;
}

// A few elements of each weight.
class Samples {
 public:
  explicit Samples(uint64_t key) : mixed_(key) {}

  void add(const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) {
      mixed_ = mix(mixed_, 1);
      return;
    }
    const int64_t n = tensor->numel();
    const uint32_t bytes = tensor->scalar_type() == ScalarType::Float ? 4 : 2;
    const char* data = static_cast<const char*>(tensor->const_data_ptr());
    const bool row_major = tensor->is_contiguous();
    weights_.push_back(*tensor);
    mixed_ = mix(mixed_, static_cast<uint64_t>(n) * 2 + (bytes == 4));
    for (int i = 0; n > 0 && i < kSamples; ++i) {
      const int64_t index = (n - 1) * i / (kSamples - 1);
      const Sample sample(data + (row_major ? index : offset(*tensor, index)) * bytes, bytes);
      found_.push_back(sample);
      mixed_ = mix(mixed_, sample.bits);
    }
  }

  uint64_t mixed() const { return mixed_; }
  const std::vector<Tensor>& weights() const { return weights_; }
  const std::vector<Sample>& found() const { return found_; }

 private:
  uint64_t mixed_;
  std::vector<Tensor> weights_;
  std::vector<Sample> found_;
};

}  // namespace

float element(const fk_array& array, int64_t index) {
  if (array.dtype == FK_F32) return static_cast<const float*>(array.data)[index];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(array.data)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

double BatchNorm::scale(int64_t c) const {
  return (weight.data ? element(weight, c) : 1.0) / std::sqrt(element(var, c) + eps);
}

double BatchNorm::shift(int64_t c) const { return (bias.data ? element(bias, c) : 0.0) - element(mean, c) * scale(c); }

BatchNorm batch_norm(const TensorList& t, size_t first, int64_t channels, double eps) {
  BatchNorm b = {weight_view(t[first], "bn weight", {channels}), weight_view(t[first + 1], "bn bias", {channels}),
                 weight_view(t[first + 2], "bn mean", {channels}), weight_view(t[first + 3], "bn var", {channels}),
                 eps};
  STD_TORCH_CHECK(!b.mean.data == !b.var.data, "bn mean, bn var: expected both or none");
  STD_TORCH_CHECK(b.mean.data || (!b.weight.data && !b.bias.data), "bn: expected statistics beside weight and bias");
  return b;
}

int64_t padded_channels(int64_t channels) {
  const int64_t lanes = kernels().lanes;
  return (channels + lanes - 1) / lanes * lanes;
}

char* Packer::take(int64_t bytes) {
  char* at = base_ ? base_ + used_ : nullptr;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return at;
}

fk_linear Packer::linear(const fk_array& weight, const fk_array& bias, int64_t n, int64_t k, bool low_precision,
                         int64_t taps) {
  return add({weight, bias, n, k, low_precision, taps, false, 1, nullptr, nullptr, nullptr});
}

fk_linear Packer::transposed(const fk_array& weight, int64_t n, int64_t k, bool low_precision, int64_t step) {
  return add({weight, absent(), n, k, low_precision, 1, true, step, nullptr, nullptr, nullptr});
}

fk_linear Packer::add(fk_pack_linear linear) {
  const int64_t panel = kernels().panel, panels = (linear.n + panel - 1) / panel;
  const int64_t depth = linear.low_precision ? (linear.k + 1) / 2 * 2 : linear.k;
  linear.panels = take(panels * panel * depth * (linear.low_precision ? 2 : 4));
  linear.packed_bias = reinterpret_cast<float*>(take(panels * panel * 4));
  const int64_t parts = splits_ && !linear.low_precision ? kernels().part_bytes(panels, linear.k) : 0;
  if (parts) linear.parts = take(parts);
  if (fills_) linears_.push_back(linear);
  return {linear.panels, linear.packed_bias, linear.n, linear.k, linear.low_precision, linear.parts};
}

fk_linear Packer::folded(const fk_array& weight, const fk_array& bias, int64_t n, int64_t k, bool low_precision,
                         const BatchNorm& in, const BatchNorm& out, int64_t taps) {
  if (!fills_ || !(in.present() || out.present())) return linear(weight, bias, n, k, low_precision, taps);
  folds_.push_back({weight, bias, n, k, in, out, std::vector<float>(static_cast<size_t>(n * k)),
                    std::vector<float>(static_cast<size_t>(n))});
  Fold& f = folds_.back();
  return linear({f.values.data(), FK_F32, n * k}, {f.shifts.data(), FK_F32, n}, n, k, low_precision, taps);
}

void Packer::fold(Fold* f) {
  std::vector<double> scale(static_cast<size_t>(f->k), 1.0), shift(static_cast<size_t>(f->k), 0.0);
  for (int64_t k = 0; f->in.present() && k < f->k; ++k) {
    scale[k] = f->in.scale(k);
    shift[k] = f->in.shift(k);
  }
  for (int64_t n = 0; n < f->n; ++n) {
    const double by = f->out.present() ? f->out.scale(n) : 1.0;
    double constant = f->bias.data ? element(f->bias, n) : 0.0;
    for (int64_t k = 0; k < f->k; ++k) {
      const double weight = element(f->weight, n * f->k + k);
      constant += weight * shift[k];
      f->values[n * f->k + k] = static_cast<float>(by * weight * scale[k]);
    }
    f->shifts[n] = static_cast<float>(by * constant + (f->out.present() ? f->out.shift(n) : 0.0));
  }
}

Affine Packer::affine(const BatchNorm& norm, int64_t n, int64_t padded, const fk_array& outer_scale,
                      const fk_array& outer_shift) {
  if (!norm.present() && !outer_scale.data && !outer_shift.data) return {nullptr, nullptr};
  float* scale = reinterpret_cast<float*>(take(padded * 4));
  float* shift = reinterpret_cast<float*>(take(padded * 4));
  if (fills_) norms_.push_back({norm, outer_scale, outer_shift, n, padded, scale, shift});
  return {scale, shift};
}

void Packer::fill_norm(const Norm& m) {
  for (int64_t c = 0; c < m.padded; ++c) {
    const bool real = c < m.n, normed = real && m.norm.present();
    const double by = real && m.outer_scale.data ? element(m.outer_scale, c) : 1.0;
    const double more = real && m.outer_shift.data ? element(m.outer_shift, c) : 0.0;
    m.scale[c] = real ? static_cast<float>((normed ? m.norm.scale(c) : 1.0) * by) : 0.0f;
    m.shift[c] = static_cast<float>((normed ? m.norm.shift(c) : 0.0) * by + more);
  }
}

const float* Packer::vector(const fk_array& source, int64_t n, int64_t padded, float fill) {
  float* to = reinterpret_cast<float*>(take(padded * 4));
  if (fills_) vectors_.push_back({source, n, padded, fill, to});
  return to;
}

const float* Packer::table(const fk_array& source, int64_t heads, int64_t queries, int64_t keys, int64_t stride) {
  float* to = reinterpret_cast<float*>(take(heads * keys * stride * 4));
  if (fills_) tables_.push_back({source, heads, queries, keys, stride, to});
  return to;
}

Filter Packer::depthwise(const fk_array& filter, const fk_array& bias, const BatchNorm& norm, int64_t n, int64_t taps,
                         int64_t padded, bool adds_input) {
  float* to = reinterpret_cast<float*>(take(taps * padded * 4));
  float* shift = reinterpret_cast<float*>(take(padded * 4));
  if (fills_) filters_.push_back({filter, bias, norm, n, taps, padded, adds_input, to, shift});
  return {to, shift};
}

void Packer::fill_filter(const Depthwise& d) {
  for (int64_t c = 0; c < d.padded; ++c) {
    const bool real = c < d.n, normed = real && d.norm.present();
    const double scale = normed ? d.norm.scale(c) : 1.0, shift = normed ? d.norm.shift(c) : 0.0;
    d.shift[c] = static_cast<float>((real && d.bias.data ? element(d.bias, c) : 0.0) * scale + shift);
    for (int64_t t = 0; t < d.taps; ++t) {
      const double centre = d.adds_input && t == d.taps / 2 ? 1.0 : 0.0;
      d.to[t * d.padded + c] = real ? static_cast<float>((element(d.filter, c * d.taps + t) + centre) * scale) : 0.0f;
    }
  }
}

// A bias in units of log2. The lowest finite number is a common mask, and must not become infinite here.
static float in_log2(float bias) {
  constexpr float kLog2E = 1.44269504f, kMost = 3e38f;
  if (std::isinf(bias)) return bias;
  const float scaled = bias * kLog2E;
  return scaled > kMost ? kMost : scaled < -kMost ? -kMost : scaled;
}

void Packer::fill() {
  for (Fold& f : folds_) fold(&f);
  for (const Norm& m : norms_) fill_norm(m);
  for (const Table& t : tables_)
    run_tasks(t.heads * t.keys, 0, [&](int64_t task, void*) {
      const int64_t h = task / t.keys, k = task % t.keys;
      for (int64_t q = 0; q < t.stride; ++q)
        t.to[task * t.stride + q] = q < t.queries ? in_log2(element(t.source, (h * t.queries + q) * t.keys + k)) : 0.0f;
    });
  for (const Vector& v : vectors_)
    for (int64_t i = 0; i < v.padded; ++i) v.to[i] = i < v.n && v.source.data ? element(v.source, i) : v.fill;
  for (const Depthwise& d : filters_) fill_filter(d);
  for (const fk_pack_linear& linear : linears_) {
    const int64_t panels = (linear.n + kernels().panel - 1) / kernels().panel;
    run_tasks(panels, 0, [&](int64_t panel, void*) { kernels().pack_panel(&linear, panel); });
  }
}

fk_norm norm_of(Packer& packer, const fk_array& weight, const fk_array& bias, std::optional<double> eps,
                int64_t channels) {
  return norm_of(packer, eps.has_value() ? FK_LAYER_NORM : FK_NO_NORM, weight, bias, eps.value_or(0.0), channels);
}

fk_norm norm_of(Packer& packer, fk_norm_kind kind, const fk_array& weight, const fk_array& bias, double eps,
                int64_t channels) {
  if (kind == FK_NO_NORM) return {nullptr, nullptr, 0.0f, kind, nullptr};
  const float* scale = packer.vector(weight, channels, channels, 1.0f);
  const float* shift = packer.vector(bias, channels, channels, 0.0f);
  return {scale, shift, static_cast<float>(eps), kind, nullptr};
}

bool carries(const std::optional<Tensor>& packed, uint64_t mark) {
  if (!packed.has_value() || !packed->is_cpu() || packed->scalar_type() != ScalarType::Byte ||
      !packed->is_contiguous() || packed->numel() < kAlignment || !data_or_null(*packed))
    return false;
  uint64_t stored;
  std::memcpy(&stored, packed->const_data_ptr(), sizeof stored);
  return stored == mark;
}

uint64_t identify(std::initializer_list<int64_t> key, TensorList& tensors, size_t first, size_t last,
                  const std::optional<Tensor>& packed, const std::function<void()>& look) {
  look();
  uint64_t state = mix(0x66617374766974ull, kernels().panel * 2 + kernels().low_precision);
  for (int64_t value : key) state = mix(state, static_cast<uint64_t>(value));
  Samples samples(state);
  for (size_t i = first; i < last; ++i) samples.add(tensors[i]);
  state = samples.mixed();
  const bool packs = !carries(packed, state);
  if (recording() && packs) give_up_recording();
  if (recording() && !packs) record_weights(samples.weights(), samples.found());
  if (!packs) return state;
  bool copied = false;
  for (size_t i = first; i < last; ++i)
    if (tensors[i].has_value() && !tensors[i]->is_contiguous()) {
      tensors[i] = torch::stable::contiguous(*tensors[i]);
      copied = true;
    }
  if (copied) look();
  return state;
}

void stamp(char* block, uint64_t mark) {
  std::memset(block, 0, kAlignment);
  std::memcpy(block, &mark, sizeof mark);
}

}  // namespace fk
