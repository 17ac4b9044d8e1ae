// Functions that take turns on one thread of the host.
#pragma once

#include <cstddef>
#include <vector>

namespace fk {

class Fiber {
 public:
  // Begins anew with `function(argument)`, which must not let an exception out.
  void start(void (*function)(void*), void* argument);
  // Goes on with the fiber until it pauses or ends; `false` once it has ended.
  bool resume();
  // Back to `resume`; to be called by the fiber that runs.
  void pause();

 private:
  static void enter(Fiber* fiber);
  void switch_out(bool ends);

  std::vector<std::max_align_t> stack_;
  void* own_ = nullptr;       // stack pointer while the fiber waits
  void* outside_ = nullptr;   // that of `resume` while it runs
  void* own_fake_ = nullptr;  // what the address sanitizer keeps of either
  void* outside_fake_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_size_ = 0;
  void (*function_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool ended_ = true;
};

}  // namespace fk
