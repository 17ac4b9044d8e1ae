#include "memory.h"

namespace fk {
namespace {

// What a thread keeps at most, and the smallest block worth it.
constexpr int64_t kMostSpare = 256 << 20, kLeastSpare = 64 << 10;

// Blocks that this thread does not need now, the oldest first.
class Spares {
 public:
  // One of at least `bytes`, and not much larger.
  std::optional<Tensor> take(int64_t bytes) {
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const int64_t size = blocks_[i].numel();
      if (size >= bytes && size <= 2 * bytes && (best == blocks_.size() || size < blocks_[best].numel())) best = i;
    }
    if (best == blocks_.size()) return std::nullopt;
    Tensor found = blocks_[best];
    blocks_.erase(blocks_.begin() + static_cast<int64_t>(best));
    bytes_ -= found.numel();
    return found;
  }
  void give(const Tensor& block) {
    if (block.numel() < kLeastSpare || block.numel() > kMostSpare) return;
    blocks_.push_back(block);
    bytes_ += block.numel();
    size_t gone = 0;
    for (; bytes_ > kMostSpare; ++gone) bytes_ -= blocks_[gone].numel();
    blocks_.erase(blocks_.begin(), blocks_.begin() + static_cast<int64_t>(gone));
  }
  int64_t clear() {
    const int64_t bytes = bytes_;
    blocks_.clear();
    bytes_ = 0;
    return bytes;
  }

 private:
  std::vector<Tensor> blocks_;
  int64_t bytes_ = 0;
};
thread_local Spares spares;

// Gives back what this thread keeps and the shelf of packed weights that is being filled; how many bytes that was.
int64_t release() { return spares.clear() + release_shelf(); }

}  // namespace

Memory::~Memory() {
  for (const Tensor& block : blocks_) spares.give(block);
}

char* Memory::block(int64_t bytes) {
  std::optional<Tensor> spare = bytes >= kLeastSpare ? spares.take(bytes) : std::nullopt;
  blocks_.push_back(spare ? *spare : empty({bytes}, ScalarType::Byte));
  char* block = static_cast<char*>(blocks_.back().mutable_data_ptr());
  if (!spare) prefer_large_pages(block, bytes);
  return block;
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CompositeExplicitAutograd, m) { m.impl("release_memory", TORCH_BOX(&fk::release)); }
