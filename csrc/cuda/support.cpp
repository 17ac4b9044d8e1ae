#include "support.h"

#include <algorithm>

namespace fk {
namespace {

constexpr int64_t kMostParts = 256;
constexpr int64_t kFewestValues = 4096;

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

void check_count(const TensorList& tensors, size_t expected) {
  STD_TORCH_CHECK(tensors.size() == expected, "tensors: expected ", expected, " entries, got ", tensors.size());
}

const Tensor& required(const TensorList& tensors, size_t index, const char* name) {
  STD_TORCH_CHECK(tensors[index].has_value(), name, ": expected a tensor, got None");
  return *tensors[index];
}

Tensor Views::checked(const std::optional<Tensor>& tensor, const char* name,
                      std::initializer_list<int64_t> shape) const {
  const auto sizes = tensor->sizes();
  STD_TORCH_CHECK(sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name,
                  ": unexpected shape");
  STD_TORCH_CHECK(on_device(*tensor) && tensor->get_device_index() == device_, name, ": on another device");
  STD_TORCH_CHECK(tensor->is_contiguous(), name, ": expected a dense row-major tensor");
  return *tensor;
}

Tensor Views::cast(const Tensor& tensor) {
  if (tensor.scalar_type() == dtype_) return tensor;
  copies_.push_back(torch::stable::to(tensor, dtype_));
  return copies_.back();
}

Array Views::array(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return {nullptr, kF32};
  const Tensor view = checked(tensor, name, shape);
  const Tensor read = view.scalar_type() == ScalarType::Float ? view : cast(view);
  return {read.const_data_ptr(), kernel_dtype(read.scalar_type())};
}

const void* Views::data(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return nullptr;
  pointers_.push_back(cast(checked(tensor, name, shape)).const_data_ptr());
  return pointers_.back();
}

Linear Views::linear(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const char* name,
                     int64_t out, int64_t in) {
  STD_TORCH_CHECK(out < (int64_t{1} << 24) && in < (int64_t{1} << 24), name, ": too many channels");
  return {data(weight, name, {out, in}), array(bias, name, {out}), static_cast<int32_t>(out), static_cast<int32_t>(in)};
}

bool Views::vectors(std::initializer_list<int64_t> columns) const {
  const int64_t size = size_of(kernel_dtype(dtype_));
  const auto whole = [](int64_t bytes) { return bytes % 16 == 0; };
  return std::all_of(columns.begin(), columns.end(), [&](int64_t n) { return whole(n * size); }) &&
         std::all_of(pointers_.begin(), pointers_.end(), [&](const void* pointer) {
           return whole(static_cast<int64_t>(reinterpret_cast<intptr_t>(pointer)));
         });
}

int32_t tile_side(int64_t side, int64_t most) {
  const int64_t blocks = (side + most - 1) / most;
  return static_cast<int32_t>((side + blocks - 1) / blocks);
}

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
  Moments p = {};
  p.x = {static_cast<const char*>(x.const_data_ptr()) + skipped * x.size(2) * size_of(dtype), dtype};
  p.sample_stride = x.size(1) * x.size(2);
  p.values = (x.size(1) - skipped) * x.size(2);
  p.values_per_part = std::max((p.values + kMostParts - 1) / kMostParts, kFewestValues);
  p.samples = static_cast<int32_t>(samples);
  p.parts = static_cast<int32_t>((p.values + p.values_per_part - 1) / p.values_per_part);
  const Tensor moments = empty(x, {samples, p.parts, 3}, ScalarType::Float);
  p.moments = static_cast<float*>(moments.mutable_data_ptr());
  stream.run(p);
  return merged_statistics(stream, moments, samples);
}

}  // namespace fk
