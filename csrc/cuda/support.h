// What the torch-facing files share: checked views of tensors, the stream of a call, statistics.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/checks.h"
#include "params.h"

// Where the operators are registered; the tests' emulator has a library of its own.
#ifndef FK_LIBRARY
#define FK_LIBRARY fastvit
#define FK_DISPATCH_KEY CUDA
#endif

namespace fk {

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

// Tokens [B, N, C] where the kernels run, of sizes that their 32-bit indices can count.
void check_tokens(const Tensor& x);
// As the functions that take a place to write to; they raise what CUDA said.
int64_t most_shared_memory();
int64_t multiprocessors();
// That a block of this many bytes of shared memory finds room on the current device.
void check_shared_memory(int64_t bytes);

// The tensors of one call as kernels see them. Copies in another dtype live as long as this.
class Views {
 public:
  Views(const Tensor& first, ScalarType dtype) : device_(first.get_device_index()), dtype_(dtype) {}

  // A dense row-major tensor in the compute dtype or in fp32; a third dtype is cast to fp32.
  Array array(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape);
  // One that is cast to the compute dtype.
  const void* data(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape);
  Linear linear(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const char* name, int64_t out,
                int64_t in);
  // Whether rows of `columns` values can be copied 16 bytes at a time from everything that `data` and `linear` gave.
  bool vectors(std::initializer_list<int64_t> columns) const;

 private:
  Tensor checked(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) const;
  Tensor cast(const Tensor& tensor, ScalarType dtype);

  int32_t device_;
  ScalarType dtype_;
  std::vector<Tensor> copies_;
  std::vector<const void*> pointers_;
};

inline int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }
// A side of a block's results, for a side of the map: as few blocks as there must be, and these about equal.
int32_t tile_side(int64_t side, int64_t most);

NormKind norm_kind(const std::string& name);
// Statistics of a GroupNorm: those given, else those of x [samples, rows, columns] behind the first `skipped` rows.
Tensor group_statistics(const Stream& stream, const std::optional<Tensor>& given, const Tensor& x, int64_t skipped);
// Those of each sample from the moments of its parts.
Tensor merged_statistics(const Stream& stream, const Tensor& moments, int64_t samples);
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);

}  // namespace fk
