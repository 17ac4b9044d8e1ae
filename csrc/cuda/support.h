// What the torch-facing files share: checked views of tensors, the stream of a call, statistics.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "params.h"

// Where the operators are registered; the tests' emulator has a library of its own.
#ifndef FK_LIBRARY
#define FK_LIBRARY fastvit
#define FK_DISPATCH_KEY CUDA
#endif

namespace fk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<std::optional<Tensor>>;

// The device of a call made current, and its stream of kernels.
class Stream {
 public:
  explicit Stream(const Tensor& tensor);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  template <class Params>
  void run(const Params& params) const {
    const char* error = launch(params, stream_);
    STD_TORCH_CHECK(!error, "CUDA: ", error);
  }

 private:
  void* guard_;
  void* stream_;
};

// Whether a tensor is where the kernels run.
bool on_device(const Tensor& tensor);

DType kernel_dtype(ScalarType dtype);
// The dtype of `residual + y` for a y in the compute dtype, which is one of the two.
ScalarType promoted(ScalarType dtype, const std::optional<Tensor>& residual);

void check_count(const TensorList& tensors, size_t expected);
const Tensor& required(const TensorList& tensors, size_t index, const char* name);

// The tensors of one call as kernels see them. Copies in another dtype live as long as this.
class Views {
 public:
  explicit Views(const Tensor& first, ScalarType dtype) : device_(first.get_device_index()), dtype_(dtype) {}

  // A dense row-major tensor in the compute dtype or in fp32; another dtype is cast to the compute dtype.
  Array array(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape);
  // The same in the compute dtype.
  const void* data(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape);
  Linear linear(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const char* name, int64_t out,
                int64_t in);
  // Whether rows of `columns` values can be copied 16 bytes at a time from everything that `data` and `linear` gave.
  bool vectors(std::initializer_list<int64_t> columns) const;

 private:
  Tensor checked(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) const;
  Tensor cast(const Tensor& tensor);

  int32_t device_;
  ScalarType dtype_;
  std::vector<Tensor> copies_;
  std::vector<const void*> pointers_;
};

// A side of a block's results, for a side of the map: as few blocks as there must be, and these about equal.
int32_t tile_side(int64_t side, int64_t most);

NormKind norm_kind(const std::string& name);
// Statistics of a GroupNorm: those given, else those of x [samples, rows, columns] behind the first `skipped` rows.
Tensor group_statistics(const Stream& stream, const std::optional<Tensor>& given, const Tensor& x, int64_t skipped);
// Those of each sample from the moments of its parts.
Tensor merged_statistics(const Stream& stream, const Tensor& moments, int64_t samples);
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);

}  // namespace fk
