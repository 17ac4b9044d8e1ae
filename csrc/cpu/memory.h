// Memory that kernels need during a call of an operator.
#pragma once

#include <vector>

#include "packed.h"

namespace fk {

// Blocks for one call. Their thread keeps some of them for its next calls when this goes: the system hands fresh pages
// out more slowly than kernels fill them.
class Memory {
 public:
  Memory() = default;
  Memory(Memory&&) = default;
  ~Memory();

  template <class T>
  T* take(int64_t values) {
    return reinterpret_cast<T*>(block(values * static_cast<int64_t>(sizeof(T))));
  }

 private:
  char* block(int64_t bytes);
  std::vector<Tensor> blocks_;
};

}  // namespace fk
