// Gradients around GroupNorm's statistics: those of a result that was returned with its own, and those of a norm in
// front of an operator.
#pragma once

#include <functional>
#include <optional>
#include <tuple>

#include "gradients.h"
#include "norm_gradients.h"

namespace fk {

bool any_nonzero(const fk_array& x);

// A result and its statistics, where they came behind their gradients; `grads` keeps those alone.
std::optional<std::tuple<Tensor, Tensor>> take_results(Grads& grads, const std::vector<int64_t>& shape,
                                                       ScalarType dtype);

// The gradient of a result [images, rows, columns] in fp32, with what comes by way of its statistics, whose gradients
// are `slopes` [images, 2]; `grad` itself where nothing does. Without `results`, result and statistics, `forward` gives
// them once more.
Tensor with_statistics(const Tensor& grad, const fk_array& slopes, int64_t rows, int64_t columns,
                       const std::optional<std::tuple<Tensor, Tensor>>& results,
                       const std::function<std::tuple<Tensor, Tensor>()>& forward);

// Positions of a norm's input and parameters among an operator's tensors.
struct NormPlaces {
  size_t x, weight, bias, statistics;
};
// Their gradients from `grad` [images * rows, columns] of the normalised rows; see `norm_gradients`.
void norm_gradients(const fk_array& x, const fk_norm& norm, bool given, const float* grad, int64_t images, int64_t rows,
                    int64_t columns, const NormPlaces& places, Gradients* found, const fk_array& own = absent());

}  // namespace fk
