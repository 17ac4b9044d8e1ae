#include "plan.h"

namespace fk {
namespace {

enum Index { kX, kResidual, kCount };

// Rows of a task; the class token's is computed by the first of an image.
constexpr int64_t kRows = 32;

Tensor run(TensorList t, std::optional<Tensor> packed, int64_t heads, ScalarType dtype) {
  check_count(t, kCount);
  STD_TORCH_CHECK(!packed.has_value(), "packed: there are no weights");
  const Tensor& x = required(t, kX, "x");
  STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions");
  STD_TORCH_CHECK(heads > 0 && heads < x.size(1), "num_heads: expected fewer than there are tokens");
  const auto call = std::make_shared<fk_merge_head_tokens>();
  fk_merge_head_tokens& m = *call;
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
  m.rows_per_task = kRows;
  m.tasks_per_image = blocks(m.rows, kRows);
  perform(
      [call] {
        run_tasks(call->batch * call->tasks_per_image, 0,
                  [&](int64_t task, void*) { kernels().merge_head_tokens(call.get(), task); });
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
