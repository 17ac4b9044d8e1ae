// The results of a backward: one fresh tensor per wanted gradient, some written by the kernels, some as partial sums.
#pragma once

#include "memory.h"

namespace fk {

using Grads = std::vector<Tensor>;
using Needs = std::vector<bool>;

// An output gradient as the kernels read it, of this shape and dtype; one of another layout is replaced by a row-major
// copy.
fk_array grad_view(Grads& grads, size_t index, size_t count, const std::vector<int64_t>& shape, ScalarType dtype);

// Memory for partial sums that one operator call uses.
constexpr int64_t kPartialBytes = 12 * 1024 * 1024;
// As many partial sums as there should be tasks at least; the shape alone may decide, not the machine.
constexpr int64_t kPartials = 8;

// How many partial sums of `bytes` each, for this many blocks of rows.
int64_t partial_count(int64_t blocks, int64_t bytes);

// Whether `needs` has one entry more than there are tensors, which is true: the residual is x itself, and x's gradient
// takes the residual's, that of the result, upon itself.
bool takes_own(const Needs& needs, size_t tensors);

class Gradients {
 public:
  // The tensors must have been checked. `may_take_own`: see takes_own.
  Gradients(const TensorList& tensors, const Needs& needs, bool may_take_own = false);
  // The gradient of the result, if x's gradient `index` takes it; else absent.
  fk_array own(size_t index, const fk_array& grad) const;

  bool wants(size_t index) const { return results_[index].has_value(); }
  // Of a gradient that the kernels write as it is; null when it is not wanted.
  void* data(size_t index);
  // The gradient of a vector or of a small weight, at hand; nothing happens unless it is wanted.
  void set(size_t index, const std::vector<double>& values);
  // The gradient is this tensor, as that of a residual is.
  void copy(size_t index, const Tensor& from);
  // `count` partial sums of the gradient of a [rows, columns] weight (vectors have one row), which `finish` adds up;
  // null when it is not wanted. `taps` as in fk_partial_sums.
  float* sums(size_t index, int64_t count, int64_t rows, int64_t columns, int64_t taps = 1);
  // Partial sums [count][2 n, padded] of the gradients of a norm's weight and bias; null when neither is wanted.
  float* affine_sums(size_t weight, size_t bias, int64_t count, int64_t n);
  // `count` partial sums of the gradient of a table [heads, queries, keys], each in panels of queries with a row for
  // each key; null when it is not wanted.
  float* table_sums(size_t index, int64_t count, int64_t heads, int64_t queries, int64_t keys);
  // Temporary memory that lives as long as this.
  float* memory(int64_t floats);

  std::vector<Tensor> finish();

 private:
  std::vector<std::optional<Tensor>> results_;
  bool own_;
  Memory memory_;
  std::vector<fk_partial_sums> sums_;
};

// A temporary matrix of the products' type between the steps of a backward.
struct Temporary {
  Tensor tensor;
  fk_array array;
};
Temporary temporary(int64_t rows, int64_t columns, bool low_precision);

// What a norm and a linear, each maybe absent, make of x [rows, k]: the forward again, of the products' type. A
// GroupNorm has its statistics every `rows_per_image` rows.
Temporary run_linear(const fk_array& x, const fk_norm& norm, int64_t rows_per_image, const fk_linear& linear,
                     int64_t rows, int64_t n, int64_t k, bool low_precision);

// Positions of the weights of a norm and a linear among an operator's tensors.
constexpr size_t kNowhere = SIZE_MAX;
struct LinearWeights {
  size_t weight = kNowhere, bias = kNowhere, norm_weight = kNowhere, norm_bias = kNowhere;
};
// What of `p` the shape alone decides, the partial sums of these weights, and the step itself.
void run_linear_backward(fk_linear_backward* p, Gradients& found, const LinearWeights& weights);
// The gradients of a linear's weight and bias alone: it reads x [rows, k], the gradient of its results is [rows, n].
void linear_weight_gradients(const fk_array& x, const fk_array& grad, int64_t rows, int64_t n, int64_t k,
                             bool low_precision, const LinearWeights& weights, Gradients& found);
// The gradient [rows, k] of what a linear reads, of the products' type, from that of its results [rows, n].
Temporary linear_input_gradients(const fk_array& grad, const fk_linear& to_input, int64_t rows, int64_t n, int64_t k,
                                 bool low_precision, Gradients& found);

}  // namespace fk
