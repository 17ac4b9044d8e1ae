#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstring>
#include <mutex>

namespace fk {
namespace {

// Memory for blocks of packed weights, one behind the other: each for itself is smaller than a large page, or leaves
// half of one over.
class Shelf {
 public:
  Tensor place(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes > kBytes / 4) return place_at(make(bytes), 0, bytes);
    // Whoever has a block of it can free its storage.
    if (!memory_ || !data_or_null(*memory_) || used_ + bytes > kBytes) {
      memory_ = make(kBytes);
      used_ = 0;
    }
    const int64_t at = used_;
    used_ += (bytes + 63) / 64 * 64;
    return place_at(*memory_, at, bytes);
  }

  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = memory_ ? memory_->numel() : 0;
    memory_.reset();
    return bytes;
  }

 private:
  static constexpr int64_t kBytes = 16 * kLargePage;

  static Tensor make(int64_t bytes) {
    Tensor memory = empty({bytes + kLargePage}, ScalarType::Byte);
    char* begin = large_page(static_cast<char*>(memory.mutable_data_ptr()));
    prefer_large_pages(begin, (bytes + kLargePage - 1) / kLargePage * kLargePage);
    return memory;
  }
  static Tensor place_at(Tensor memory, int64_t at, int64_t bytes) {
    char* base = static_cast<char*>(memory.mutable_data_ptr());
    return torch::stable::narrow(memory, 0, large_page(base) - base + at, bytes);
  }

  std::mutex mutex_;
  std::optional<Tensor> memory_;
  int64_t used_ = 0;
};

// Never destroyed: at the end of the process torch may be gone first.
Shelf& shelf() {
  static Shelf& it = *new Shelf;
  return it;
}

// A copy of `block` that lies between others, for weights that stay for many calls.
Tensor shelve(Tensor block) {
  STD_TORCH_CHECK(block.dim() == 1 && block.is_contiguous() && block.scalar_type() == ScalarType::Byte,
                  "block: expected a row of bytes");
  const Tensor copy = shelf().place(block.numel());
  std::memcpy(copy.mutable_data_ptr(), block.const_data_ptr(), static_cast<size_t>(block.numel()));
  return copy;
}

}  // namespace

char* large_page(char* address) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), size = static_cast<uintptr_t>(kLargePage);
  return address + ((at + size - 1) / size * size - at);
}

void prefer_large_pages(char* block, int64_t bytes) {
#ifdef __linux__
  char* const begin = large_page(block);
  const int64_t pages = (block + bytes - begin) / kLargePage;
  if (pages > 0) madvise(begin, static_cast<size_t>(pages * kLargePage), MADV_HUGEPAGE);
#else
  (void)block;
  (void)bytes;
#endif
}

int64_t release_shelf() { return shelf().release(); }

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) { m.impl("shelve", TORCH_BOX(&fk::shelve)); }
