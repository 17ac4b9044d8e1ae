// Gradients as tensors, and those of the norm in front of an operator or behind it.
#pragma once

#include "memory.h"
#include "norms.h"

namespace fk {

// Uninitialised, with the shape and dtype of what it is the gradient of.
Tensor gradient_of(const Tensor& tensor);

// `n` values of an array from `at` on in fp32.
void read_values(const fk_array& from, int64_t at, int64_t n, float* to);

// Sets elements of a row-major fp32 or bf16 tensor.
class Writer {
 public:
  explicit Writer(const Tensor& to)
      : wide_(to.scalar_type() == ScalarType::Float), data_(const_cast<Tensor&>(to).mutable_data_ptr()) {}
  void set(int64_t index, float value) const {
    if (wide_)
      static_cast<float*>(data_)[index] = value;
    else
      static_cast<uint16_t*>(data_)[index] = rounded(value);
  }
  // `n` neighbours.
  void set(int64_t first, const float* values, int64_t n) const;

 private:
  static uint16_t rounded(float value);
  bool wide_;
  void* data_;
};

// Sums over the rows of a tensor [images, skipped + rows, columns] without the skipped ones.
std::vector<double> column_sums(const fk_array& x, int64_t images, int64_t skipped, int64_t rows, int64_t columns);

// The gradients of a norm's input and parameters; those not asked for stay null.
struct NormGradients {
  void* x = nullptr;  // like the input, but for its skipped rows
  fk_array own = {};  // like the input, added to `x`; data null: nothing
  std::vector<double>*weight = nullptr, *bias = nullptr;
  float* statistics = nullptr;  // [images, 2], of mean and variance given beside x
};
// `grad`: [parts][images * rows][stride] of the result, the parts to be summed. With `given` statistics those of a
// GroupNorm are constants as far as x is concerned.
void norm_gradients(const fk_array& x, const fk_norm& norm, bool given, const float* grad, int64_t stride,
                    int64_t parts, int64_t images, int64_t skipped, int64_t rows, int64_t columns,
                    const NormGradients& out);

}  // namespace fk
