// What the torch-facing files of the CPU and of the CUDA part share: tensors of a call, and checks of them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace fk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<std::optional<Tensor>>;

inline void check_count(const TensorList& tensors, size_t expected) {
  STD_TORCH_CHECK(tensors.size() == expected, "tensors: expected ", expected, " entries, got ", tensors.size());
}

inline const Tensor& required(const TensorList& tensors, size_t index, const char* name) {
  STD_TORCH_CHECK(tensors[index].has_value(), name, ": expected a tensor, got None");
  return *tensors[index];
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name,
                  ": unexpected shape");
}

// Null where the memory has been freed, also that of a view, whose pointer is then no more than its offset.
inline const void* data_or_null(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  const auto offset = static_cast<uintptr_t>(tensor.storage_offset()) * tensor.element_size();
  return reinterpret_cast<uintptr_t>(data) == offset ? nullptr : data;
}

inline const void* data_of(const Tensor& tensor, const char* name) {
  const void* data = data_or_null(tensor);
  STD_TORCH_CHECK(data || tensor.numel() == 0, name, ": its memory has been freed");
  return data;
}

// A map of height x width behind `prefix` tokens makes all tokens.
inline void check_grid(int64_t tokens, int64_t prefix, int64_t height, int64_t width) {
  STD_TORCH_CHECK(height > 0 && width > 0 && prefix >= 0 && prefix < tokens && (tokens - prefix) % height == 0 &&
                      (tokens - prefix) / height == width,
                  "grid: does not make the tokens of x");
}

// Both parts have an enumeration of the activations in this order.
inline int activation_index(const std::string& name) {
  const char* const names[] = {"gelu", "quick_gelu", "silu", "relu", "none"};
  const auto found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "activation: unknown name");
  return static_cast<int>(found - std::begin(names));
}

}  // namespace fk
