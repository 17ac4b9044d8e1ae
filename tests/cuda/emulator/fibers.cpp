#include "fibers.h"

#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fk {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

void start_switch(void** keep, const void* bottom, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(keep, bottom, size);
#else
  (void)keep, (void)bottom, (void)size;
#endif
}

void finish_switch(void* kept, const void** bottom, size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(kept, bottom, size);
#else
  (void)kept, (void)bottom, (void)size;
#endif
}

}  // namespace

#ifdef __x86_64__
// swapcontext asks the kernel for the signal mask at every switch, and the sanitizer then clears the whole stack.
extern "C" void fk_switch_stack(void** keep, void* to);
asm(R"(
.text
.type fk_switch_stack, @function
fk_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fk_switch_stack, .-fk_switch_stack
)");

namespace {

// Where `fk_switch_stack` returns to in a new fiber: `enter` was left in %rbx and the fiber in %r12.
extern "C" void fk_first_switch();
asm(R"(
.text
.type fk_first_switch, @function
fk_first_switch:
  movq %r12, %rdi
  callq *%rbx
  ud2
.size fk_first_switch, .-fk_first_switch
)");

void prepare(void** own, void* bottom, void (*enter)(Fiber*), Fiber* fiber) {
  void** top = reinterpret_cast<void**>(static_cast<char*>(bottom) + kStackBytes);
  *--top = reinterpret_cast<void*>(&fk_first_switch);
  *--top = nullptr;                         // rbp
  *--top = reinterpret_cast<void*>(enter);  // rbx
  *--top = fiber;                           // r12
  for (int i = 0; i < 3; ++i) *--top = nullptr;
  *own = top;
}

}  // namespace
#else
namespace {

struct Context {
  ucontext_t own;
  void (*enter)(Fiber*);
  Fiber* fiber;
};

void first_switch(unsigned high, unsigned low) {
  Context* context = reinterpret_cast<Context*>(static_cast<uintptr_t>(uint64_t{high} << 32 | low));
  context->enter(context->fiber);
}

void prepare(void** own, void* bottom, void (*enter)(Fiber*), Fiber* fiber) {
  // The context lies at the bottom of its own stack.
  Context* context = static_cast<Context*>(bottom);
  context->enter = enter;
  context->fiber = fiber;
  getcontext(&context->own);
  context->own.uc_stack.ss_sp = context + 1;
  context->own.uc_stack.ss_size = kStackBytes - sizeof(Context);
  context->own.uc_link = nullptr;
  const uint64_t address = reinterpret_cast<uintptr_t>(context);
  makecontext(&context->own, reinterpret_cast<void (*)()>(first_switch), 2, static_cast<unsigned>(address >> 32),
              static_cast<unsigned>(address));
  *own = &context->own;
}

void fk_switch_stack(void** keep, void* to) {
  ucontext_t here;
  *keep = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

}  // namespace
#endif

void Fiber::start(void (*function)(void*), void* argument) {
  stack_.resize(kStackBytes / sizeof(std::max_align_t));
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack_.data(), kStackBytes);
#endif
  function_ = function;
  argument_ = argument;
  own_fake_ = nullptr;
  ended_ = false;
  prepare(&own_, stack_.data(), &Fiber::enter, this);
}

void Fiber::enter(Fiber* fiber) {
  finish_switch(nullptr, &fiber->outside_stack_, &fiber->outside_size_);
  fiber->function_(fiber->argument_);
  fiber->ended_ = true;
  fiber->switch_out(true);
}

bool Fiber::resume() {
  start_switch(&outside_fake_, stack_.data(), kStackBytes);
  fk_switch_stack(&outside_, own_);
  finish_switch(outside_fake_, nullptr, nullptr);
  return !ended_;
}

void Fiber::pause() { switch_out(false); }

void Fiber::switch_out(bool ends) {
  start_switch(ends ? nullptr : &own_fake_, outside_stack_, outside_size_);
  fk_switch_stack(&own_, outside_);
  finish_switch(own_fake_, &outside_stack_, &outside_size_);
}

}  // namespace fk
