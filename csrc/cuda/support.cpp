#include "support.h"

namespace fk {
namespace {

constexpr int64_t kMostParts = 256;
constexpr int64_t kFewestValues = 4096;
constexpr int64_t kMostSamples = int64_t{1} << 30;
constexpr int64_t kMostTokens = int64_t{1} << 30;
// A tile of 128 such rows has less than 2^31 bytes.
constexpr int64_t kMostChannels = int64_t{1} << 20;

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

DType kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return kF32;
    case ScalarType::BFloat16:
      return kBF16;
    case ScalarType::Half:
      return kF16;
    default:
      STD_TORCH_CHECK(false, "dtype: the CUDA kernels take float32, bfloat16 and float16");
  }
}

ScalarType promoted(ScalarType dtype, const std::optional<Tensor>& residual) {
  if (!residual.has_value() || residual->scalar_type() == dtype) return dtype;
  STD_TORCH_CHECK(residual->scalar_type() == ScalarType::Float || dtype == ScalarType::Float,
                  "residual: expected the compute dtype or float32");
  return ScalarType::Float;
}

void check_tokens(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && on_device(x), "x: expected 3 dimensions on a CUDA device");
  STD_TORCH_CHECK(x.size(0) < kMostSamples && x.size(1) < kMostTokens && x.size(2) > 0 && x.size(2) < kMostChannels,
                  "x: expected less than 2^20 channels, and 2^30 samples and tokens");
}

int64_t most_shared_memory() {
  int64_t bytes = 0;
  const char* problem = most_shared_memory(&bytes);
  STD_TORCH_CHECK(!problem, "CUDA, asked for the shared memory of a block: ", problem);
  return bytes;
}

int64_t multiprocessors() {
  int64_t count = 0;
  const char* problem = multiprocessors(&count);
  STD_TORCH_CHECK(!problem, "CUDA, asked for the multiprocessors: ", problem);
  return count;
}

void check_shared_memory(int64_t bytes) {
  const int64_t most = most_shared_memory();
  STD_TORCH_CHECK(bytes <= most, "shared memory: a block needs ", bytes, " bytes of shared memory, and has at most ",
                  most);
}

Tensor Views::checked(const std::optional<Tensor>& tensor, const char* name,
                      std::initializer_list<int64_t> shape) const {
  check_shape(*tensor, name, shape);
  STD_TORCH_CHECK(on_device(*tensor) && tensor->get_device_index() == device_, name, ": on another device");
  STD_TORCH_CHECK(tensor->is_contiguous(), name, ": expected a dense row-major tensor");
  data_of(*tensor, name);
  return *tensor;
}

Tensor Views::cast(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  copies_.push_back(torch::stable::to(tensor, dtype));
  return copies_.back();
}

Array Views::array(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return {nullptr, kF32};
  const Tensor view = checked(tensor, name, shape);
  const Tensor read = view.scalar_type() == dtype_ ? view : cast(view, ScalarType::Float);
  return {read.const_data_ptr(), kernel_dtype(read.scalar_type()), is_aligned(read.const_data_ptr())};
}

const void* Views::data(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return nullptr;
  pointers_.push_back(cast(checked(tensor, name, shape), dtype_).const_data_ptr());
  return pointers_.back();
}

Linear Views::linear(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const char* name,
                     int64_t out, int64_t in) {
  STD_TORCH_CHECK(out < kMostChannels && in < kMostChannels, name, ": too many channels");
  return {data(weight, name, {out, in}), array(bias, name, {out}), static_cast<int32_t>(out), static_cast<int32_t>(in)};
}

bool Views::vectors(std::initializer_list<int64_t> columns) const {
  const int64_t size = size_of(kernel_dtype(dtype_));
  return std::all_of(columns.begin(), columns.end(), [&](int64_t n) { return n * size % 16 == 0; }) &&
         std::all_of(pointers_.begin(), pointers_.end(), is_aligned);
}

int32_t tile_side(int64_t side, int64_t most) { return static_cast<int32_t>(parts(side, parts(side, most))); }

NormKind norm_kind(const std::string& name) {
  STD_TORCH_CHECK(name == "none" || name == "layer" || name == "group", "norm: unknown name");
  return name == "none" ? kNoNorm : name == "layer" ? kLayerNorm : kGroupNorm;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

Tensor merged_statistics(const Stream& stream, const Tensor& moments, int64_t samples) {
  const Tensor statistics = empty(moments, {samples, 2}, ScalarType::Float);
  MergeMoments p = {};
  p.moments = static_cast<const float*>(moments.const_data_ptr());
  p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  p.samples = static_cast<int32_t>(samples);
  p.parts = static_cast<int32_t>(samples ? moments.numel() / 3 / samples : 0);
  stream.run(p);
  return statistics;
}

Tensor group_statistics(const Stream& stream, const std::optional<Tensor>& given, const Tensor& x, int64_t skipped) {
  const int64_t samples = x.size(0);
  if (given.has_value()) {
    Views views(x, ScalarType::Float);
    views.data(given, "norm_statistics", {samples, 2});
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float, "norm_statistics: expected float32");
    return *given;
  }
  const DType dtype = kernel_dtype(x.scalar_type());
  const char* first = static_cast<const char*>(x.const_data_ptr()) + skipped * x.size(2) * size_of(dtype);
  Moments p = {};
  p.x = {first, dtype, is_aligned(first)};
  p.sample_stride = x.size(1) * x.size(2);
  p.values = (x.size(1) - skipped) * x.size(2);
  // Whole vectors of any dtype.
  p.values_per_part = std::max(parts(parts(p.values, kMostParts), 16) * 16, kFewestValues);
  p.samples = static_cast<int32_t>(samples);
  p.parts = static_cast<int32_t>(parts(p.values, p.values_per_part));
  const Tensor moments = empty(x, {samples, p.parts, 3}, ScalarType::Float);
  p.moments = static_cast<float*>(moments.mutable_data_ptr());
  stream.run(p);
  return merged_statistics(stream, moments, samples);
}

}  // namespace fk
