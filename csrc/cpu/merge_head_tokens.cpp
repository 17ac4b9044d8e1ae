#include <cstring>

#include "plan.h"

namespace fk {
namespace {

enum Index { kX, kResidual, kCount };

// Rows of a task; the class token's is computed by the first of an image.
constexpr int64_t kRows = 32;

struct Merge {
  fk_array x, residual;
  void* out;
  fk_dtype out_dtype;
  int64_t batch, rows, heads, channels, tasks_per_image;
};

float value(float x) { return x; }
float value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

void put(float* to, float x) { *to = x; }
void put(uint16_t* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // To nearest, ties to even; a NaN stays one.
  *to = static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

template <class X, class R, class Out>
void add_rows(const Merge& m, int64_t image, int64_t first, int64_t last) {
  const int64_t n = m.channels;
  const X* x = static_cast<const X*>(m.x.data) + image * (m.rows + m.heads) * n;
  const R* residual = m.residual.data ? static_cast<const R*>(m.residual.data) + image * m.rows * n : nullptr;
  Out* out = static_cast<Out*>(m.out) + image * m.rows * n;
  for (int64_t i = first * n; i < last * n; ++i) put(out + i, value(x[i]) + (residual ? value(residual[i]) : 0.0f));
  if (first > 0) return;
  for (int64_t c = 0; c < n; ++c) {
    double sum = 0.0;
    for (int64_t head = 0; head < m.heads; ++head) sum += value(x[(m.rows + head) * n + c]);
    const double mean = sum / static_cast<double>(m.heads);
    const double own = value(x[c]) + (residual ? static_cast<double>(value(residual[c])) : 0.0);
    put(out + c, static_cast<float>(own + mean));
  }
}

template <class X, class R>
void add_rows(const Merge& m, int64_t image, int64_t first, int64_t last) {
  m.out_dtype == FK_F32 ? add_rows<X, R, float>(m, image, first, last)
                        : add_rows<X, R, uint16_t>(m, image, first, last);
}

template <class X>
void add_rows(const Merge& m, int64_t image, int64_t first, int64_t last) {
  m.residual.dtype == FK_F32 ? add_rows<X, float>(m, image, first, last) : add_rows<X, uint16_t>(m, image, first, last);
}

Tensor run(TensorList t, std::optional<Tensor> packed, int64_t heads, ScalarType dtype) {
  check_count(t, kCount);
  STD_TORCH_CHECK(!packed.has_value(), "packed: there are no weights");
  const Tensor& x = required(t, kX, "x");
  STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions");
  STD_TORCH_CHECK(heads > 0 && heads < x.size(1), "num_heads: expected fewer than there are tokens");
  const auto call = std::make_shared<Merge>();
  Merge& m = *call;
  m.batch = x.size(0);
  m.rows = x.size(1) - heads;
  m.heads = heads;
  m.channels = x.size(2);
  const ScalarType out_dtype = promoted(dtype, t[kResidual]);
  Tensor out = empty({m.batch, m.rows, m.channels}, out_dtype);
  m.x = view(x, "x");
  m.residual = view(t[kResidual], "residual", {m.batch, m.rows, m.channels});
  m.out = out.mutable_data_ptr();
  m.out_dtype = kernel_dtype(out_dtype);
  m.tasks_per_image = blocks(m.rows, kRows);
  perform(
      [call] {
        run_tasks(call->batch * call->tasks_per_image, 0, [&](int64_t task, void*) {
          const int64_t image = task / call->tasks_per_image, first = task % call->tasks_per_image * kRows;
          const int64_t last = std::min(first + kRows, call->rows);
          call->x.dtype == FK_F32 ? add_rows<float>(*call, image, first, last)
                                  : add_rows<uint16_t>(*call, image, first, last);
        });
      },
      {&m.x.data, &m.residual.data, &m.out}, {out});
  return out;
}

// Nothing is packed.
Tensor pack_only(TensorList t, int64_t, ScalarType) {
  check_count(t, kCount);
  return empty({0}, ScalarType::Byte);
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("merge_head_tokens", TORCH_BOX(&fk::run));
  m.impl("merge_head_tokens_pack", TORCH_BOX(&fk::pack_only));
}
