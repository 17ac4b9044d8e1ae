#include "statistics_gradients.h"

namespace fk {

bool any_nonzero(const fk_array& x) {
  for (int64_t i = 0; i < x.size; ++i)
    if (!(element(x, i) == 0.0f)) return true;
  return false;
}

std::optional<std::tuple<Tensor, Tensor>> take_results(Grads& grads, const std::vector<int64_t>& shape,
                                                       ScalarType dtype) {
  if (grads.size() != 4) return std::nullopt;
  grad_view(grads, 2, 4, shape, dtype);
  grad_view(grads, 3, 4, {shape[0], 2}, ScalarType::Float);
  const std::tuple<Tensor, Tensor> results(grads[2], grads[3]);
  grads.resize(2);
  return results;
}

Tensor with_statistics(const Tensor& grad, const fk_array& slopes, int64_t rows, int64_t columns,
                       const std::optional<std::tuple<Tensor, Tensor>>& results,
                       const std::function<std::tuple<Tensor, Tensor>()>& forward) {
  if (!any_nonzero(slopes)) return grad;
  const auto [out, statistics] = results ? *results : forward();
  const int64_t images = grad.size(0);
  Tensor sums = empty({images, rows, columns}, ScalarType::Float);
  fk_statistics_backward p = {};
  p.grad = view(grad, "grads");
  p.out = view(out, "out");
  p.statistics = static_cast<const float*>(statistics.const_data_ptr());
  p.slopes = static_cast<const float*>(slopes.data);
  p.rows = rows;
  p.columns = columns;
  p.to = static_cast<float*>(sums.mutable_data_ptr());
  p.images = images;
  p.rows_per_task = kMomentRows;
  run_tasks(blocks(images * rows, kMomentRows), 0,
            [&](int64_t task, void*) { kernels().statistics_backward(&p, task); });
  return sums;
}

void norm_gradients(const fk_array& x, const fk_norm& norm, bool given, const float* grad, int64_t images, int64_t rows,
                    int64_t columns, const NormPlaces& places, Gradients* found, const fk_array& own) {
  std::vector<double> weight, bias;
  NormGradients out;
  out.x = found->data(places.x);
  out.own = own;
  if (found->wants(places.weight)) out.weight = &weight;
  if (found->wants(places.bias)) out.bias = &bias;
  out.statistics = static_cast<float*>(found->data(places.statistics));
  norm_gradients(x, norm, given, grad, columns, 1, images, 0, rows, columns, out);
  found->set(places.weight, weight);
  found->set(places.bias, bias);
}

}  // namespace fk
