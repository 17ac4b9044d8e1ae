// Several calls of operators as one: a plan has their checked arguments and packed weights, and runs them again on
// other activations without torch in between. What lies between them has places in memory that the running thread
// keeps.
//
// A thread records what it calls between `plan_begin` and `plan_end`. Weights are taken as they lie then; `replay`
// looks at samples of each (see `identify`) and does nothing where one has changed.
#pragma once

#include <cstring>
#include <functional>
#include <memory>

#include "support.h"

namespace fk {

// Whether this thread records a plan.
bool recording();

// An element of a weight.
struct Sample {
  const char* address;
  uint32_t bytes, bits;

  Sample(const char* address, uint32_t bytes) : address(address), bytes(bytes), bits(now()) {}
  uint32_t now() const {
    uint32_t found = 0;
    std::memcpy(&found, address, bytes);
    return found;
  }
};

// Weights that a call found packed, and samples of them.
void record_weights(const std::vector<Tensor>& weights, const std::vector<Sample>& samples);
// Weights that it had to pack for itself: no plan can come of that.
void give_up_recording();

// What a call computes, and the addresses of the pointers (null ones do not count) through which it reads activations
// and writes the `results`.
void record_call(std::function<void()> run, std::initializer_list<void*> pointers, std::vector<Tensor> results);

// Compute now, and whenever the plan runs that this thread records.
template <class Run>
void perform(const Run& run, std::initializer_list<void*> pointers, const std::vector<Tensor>& results) {
  run();
  if (recording()) record_call(run, pointers, results);
}

}  // namespace fk
