// What the torch-facing files share: checked views of tensors, the chosen kernel table, scratch memory, the task loop.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "../common/checks.h"
#include "kernels.h"

namespace fk {

// The kernels for this machine: the best instruction set it has, lowered by FASTVIT_CPU_ISA.
const fk_table& kernels();

// A dense row-major CPU tensor in fp32 or bf16 as the kernels see it. Raises on anything else: the kernels trust it.
fk_array view(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape);
fk_array view(const Tensor& tensor, const char* name);
// The same for a weight, which may have any layout: it is read only when it is packed (see `identify`).
fk_array weight_view(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape);
inline fk_array absent() { return {nullptr, FK_F32, 0}; }

// The rows of a tensor [B, N, C] that may lie `stride` values apart, as slices of wider rows do; a tensor of any other
// layout is replaced by a row-major copy.
fk_array rows_view(std::optional<Tensor>* tensor, const char* name, int64_t* stride);

// Sizes, strides and paddings beyond this would overflow the kernels' arithmetic.
constexpr int64_t kMostSize = int64_t{1} << 30;

// A filter finds room on the padded map, and its numbers are sane.
void check_window(int64_t kernel, int64_t stride, int64_t padding, int64_t height, int64_t width,
                  int64_t most_padding = kMostSize);

// A bias that no projection would add is a mistake of the caller.
void check_bias(const TensorList& tensors, size_t bias, size_t weight, const char* name);

fk_dtype kernel_dtype(ScalarType dtype);
fk_activation activation_of(const std::string& name);
Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype);

// 64-byte aligned memory that grows as needed; what it gave is valid until it is asked again.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena();
  void* at_least(int64_t bytes);

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// Memory of this thread, kept from call to call; valid until the thread asks again.
void* scratch(int64_t bytes);

// The tasks of one thread, and of those that have none left.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Run `task(index, scratch)` for every index on all threads. Each thread begins with a share of neighbouring tasks, the
// same at every call: what it reads is often what it wrote in the operator before, and still in its core's cache. Then
// it helps the others out.
template <class Task>
void run_tasks(int64_t tasks, int64_t scratch_bytes, const Task& task) {
  if (tasks <= 0) return;
  constexpr int64_t kMostShares = 64;
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t shares = std::min(workers, kMostShares);
  Share share[kMostShares];
  for (int64_t i = 0; i < shares; ++i) {
    share[i].next.store(i * tasks / shares, std::memory_order_relaxed);
    share[i].end = (i + 1) * tasks / shares;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    (void)last;
    void* memory = scratch(scratch_bytes);
    for (int64_t i = 0; i < shares; ++i) {
      Share& s = share[(first + i) % shares];
      for (int64_t index; (index = s.next.fetch_add(1, std::memory_order_relaxed)) < s.end;) task(index, memory);
    }
  });
}

// Part of a core's L2 cache that a task's rows may fill; the weights stream through the rest.
constexpr int64_t kCacheBytes = 320 * 1024;

inline int64_t blocks(int64_t rows, int64_t rows_per_task) { return (rows + rows_per_task - 1) / rows_per_task; }

// Whether `test(first, last)` holds for all of n things, `per_task` at a time on all threads.
template <class Test>
bool all_of(int64_t n, int64_t per_task, const Test& test) {
  std::atomic<bool> all{true};
  run_tasks(blocks(n, per_task), 0, [&](int64_t task, void*) {
    if (!test(task * per_task, std::min(n, (task + 1) * per_task))) all.store(false, std::memory_order_relaxed);
  });
  return all.load(std::memory_order_relaxed);
}

// Rows of a task, at most `most`: even blocks, and a multiple of the threads when there are few.
int64_t rows_per_task(int64_t rows, int64_t most);
// The same for rows that cannot be mixed across the images of a batch.
int64_t rows_per_image_task(int64_t images, int64_t rows, int64_t most);

// dtype of `residual + y` for a y in the compute dtype.
ScalarType promoted(ScalarType dtype, const std::optional<Tensor>& residual);
void check_same_shape(const Tensor& tensor, const Tensor& other, const char* name);

}  // namespace fk
