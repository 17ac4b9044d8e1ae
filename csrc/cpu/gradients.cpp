#include "gradients.h"

#include "norm_gradients.h"

namespace fk {
namespace {

int64_t padded(int64_t columns) {
  const int64_t panel = kernels().panel;
  return (columns + panel - 1) / panel * panel;
}

}  // namespace

fk_array grad_view(Grads& grads, size_t index, size_t count, const std::vector<int64_t>& shape, ScalarType dtype) {
  STD_TORCH_CHECK(grads.size() == count, "grads: expected ", count, " entries, got ", grads.size());
  Tensor& grad = grads[index];
  const auto sizes = grad.sizes();
  STD_TORCH_CHECK(sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()),
                  "grads: unexpected shape");
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == dtype, "grads: expected CPU tensors of the outputs' dtypes");
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  return view(grad, "grads");
}

int64_t partial_count(int64_t blocks, int64_t bytes) {
  const int64_t most = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, bytes));
  return std::min({blocks, most, kPartials});
}

bool takes_own(const Needs& needs, size_t tensors) {
  STD_TORCH_CHECK(needs.size() == tensors || needs.size() == tensors + 1, "needs: expected ", tensors, " entries, got ",
                  needs.size());
  return needs.size() > tensors && needs.back();
}

Gradients::Gradients(const TensorList& tensors, const Needs& needs, bool may_take_own)
    : own_(takes_own(needs, tensors.size())) {
  STD_TORCH_CHECK(!own_ || may_take_own, "needs: expected ", tensors.size(), " entries, got ", needs.size());
  results_.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i)
    if (needs[i] && tensors[i].has_value()) {
      const auto sizes = tensors[i]->sizes();
      results_[i] = empty(std::vector<int64_t>(sizes.begin(), sizes.end()), tensors[i]->scalar_type());
    }
}

fk_array Gradients::own(size_t index, const fk_array& grad) const {
  if (!own_ || !wants(index)) return absent();
  STD_TORCH_CHECK(grad.size == results_[index]->numel() && grad.dtype == kernel_dtype(results_[index]->scalar_type()),
                  "needs: the residual cannot be x");
  return grad;
}

void* Gradients::data(size_t index) { return wants(index) ? results_[index]->mutable_data_ptr() : nullptr; }

void Gradients::set(size_t index, const std::vector<double>& values) {
  if (!wants(index)) return;
  const Writer writer(*results_[index]);
  for (size_t i = 0; i < values.size(); ++i) writer.set(static_cast<int64_t>(i), static_cast<float>(values[i]));
}

void Gradients::copy(size_t index, const Tensor& from) {
  if (wants(index)) torch::stable::copy_(*results_[index], from);
}

float* Gradients::memory(int64_t floats) { return memory_.take<float>(floats); }

float* Gradients::sums(size_t index, int64_t count, int64_t rows, int64_t columns, int64_t taps) {
  if (!wants(index)) return nullptr;
  const int64_t stride = rows * padded(columns);
  float* partials = memory(count * stride);
  sums_.push_back({partials, count, stride, rows, columns, taps, results_[index]->mutable_data_ptr(),
                   kernel_dtype(results_[index]->scalar_type()), 0});
  return partials;
}

float* Gradients::table_sums(size_t index, int64_t count, int64_t heads, int64_t queries, int64_t keys) {
  if (!wants(index)) return nullptr;
  const int64_t head = padded(queries) * keys;
  float* partials = memory(count * heads * head);
  char* to = static_cast<char*>(results_[index]->mutable_data_ptr());
  const fk_dtype dtype = kernel_dtype(results_[index]->scalar_type());
  for (int64_t h = 0; h < heads; ++h)
    sums_.push_back({partials + h * head, count, heads * head, keys, queries, 1,
                     to + h * queries * keys * (dtype == FK_F32 ? 4 : 2), dtype, 1});
  return partials;
}

float* Gradients::affine_sums(size_t weight, size_t bias, int64_t count, int64_t n) {
  if (!wants(weight) && !wants(bias)) return nullptr;
  // The last panel of the biases may read past the end of its partial sum.
  const int64_t stride = padded(2 * n);
  float* partials = memory(count * stride + kernels().panel);
  for (size_t index : {weight, bias})
    if (wants(index))
      sums_.push_back({partials + (index == bias ? n : 0), count, stride, 1, n, 1, results_[index]->mutable_data_ptr(),
                       kernel_dtype(results_[index]->scalar_type()), 0});
  return partials;
}

Temporary temporary(int64_t rows, int64_t columns, bool low_precision) {
  const ScalarType dtype = low_precision ? ScalarType::BFloat16 : ScalarType::Float;
  Temporary t = {empty({rows, columns}, dtype), {nullptr, kernel_dtype(dtype), rows * columns}};
  t.array.data = t.tensor.mutable_data_ptr();
  return t;
}

void run_linear_backward(fk_linear_backward* p, Gradients& found, const LinearWeights& weights) {
  constexpr int64_t kMostRows = 224, kFewestRows = 56;
  const int64_t cached = 2 * kCacheBytes / (8 * std::max(p->k, p->n));
  p->rows_per_block = std::max<int64_t>(1, std::min({p->rows, kMostRows, std::max(kFewestRows, cached)}));
  p->partials = partial_count(blocks(p->rows, p->rows_per_block), 4 * p->n * p->k);
  if (weights.weight != kNowhere) p->weight = found.sums(weights.weight, p->partials, p->n, p->k);
  if (weights.bias != kNowhere) p->bias = found.sums(weights.bias, p->partials, 1, p->n);
  if (weights.norm_weight != kNowhere)
    p->affine = found.affine_sums(weights.norm_weight, weights.norm_bias, p->partials, p->k);
  if (!p->weight && !p->bias && !p->affine && !p->dx && !p->inputs) return;
  const fk_table& k = kernels();
  run_tasks(p->partials, k.scratch_linear_backward(p),
            [&](int64_t task, void* memory) { k.linear_backward(p, task, memory); });
}

Temporary run_linear(const fk_array& x, const fk_norm& norm, int64_t rows_per_image, const fk_linear& linear,
                     int64_t rows, int64_t n, int64_t k, bool low_precision) {
  Temporary to = temporary(rows, n, low_precision);
  fk_linear_forward p = {};
  p.x = x;
  p.norm = norm;
  p.rows_per_image = std::max<int64_t>(1, rows_per_image);
  p.linear = linear;
  p.low_precision = low_precision;
  p.rows = rows;
  p.n = n;
  p.k = k;
  p.rows_per_task = rows_per_task(rows, 224);
  p.out = to.tensor.mutable_data_ptr();
  const fk_table& kernel = kernels();
  run_tasks(blocks(rows, p.rows_per_task), kernel.scratch_linear_forward(&p),
            [&](int64_t task, void* memory) { kernel.linear_forward(&p, task, memory); });
  return to;
}

void linear_weight_gradients(const fk_array& x, const fk_array& grad, int64_t rows, int64_t n, int64_t k,
                             bool low_precision, const LinearWeights& weights, Gradients& found) {
  fk_linear_backward p = {};
  p.x = x;
  p.grad = grad;
  p.low_precision = low_precision;
  p.rows = rows;
  p.n = n;
  p.k = k;
  run_linear_backward(&p, found, weights);
}

Temporary linear_input_gradients(const fk_array& grad, const fk_linear& to_input, int64_t rows, int64_t n, int64_t k,
                                 bool low_precision, Gradients& found) {
  Temporary to = temporary(rows, k, low_precision);
  fk_linear_backward p = {};
  p.x.dtype = to.array.dtype;
  p.grad = grad;
  p.to_input = to_input;
  p.low_precision = low_precision;
  p.rows = rows;
  p.n = n;
  p.k = k;
  p.dx = to.tensor.mutable_data_ptr();
  run_linear_backward(&p, found, {});
  return to;
}

std::vector<Tensor> Gradients::finish() {
  struct Task {
    const fk_partial_sums* sums;
    int64_t panel;
  };
  std::vector<Task> tasks;
  for (const fk_partial_sums& s : sums_)
    for (int64_t panel = 0; panel < padded(s.columns) / kernels().panel; ++panel) tasks.push_back({&s, panel});
  run_tasks(static_cast<int64_t>(tasks.size()), 0,
            [&](int64_t task, void*) { kernels().add_partials(tasks[task].sums, tasks[task].panel); });
  std::vector<Tensor> found;
  for (const std::optional<Tensor>& result : results_)
    if (result.has_value()) found.push_back(*result);
  return found;
}

}  // namespace fk
