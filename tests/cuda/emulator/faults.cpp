// Kernels with the mistakes that the emulator is there to show. Each fills out[64] with its thread's index, if at all.
#include <vector>

#include "device.h"
#include "ptx.h"

namespace fk {
namespace {

constexpr int kThreads = 64;

struct Fault {
  int32_t which;
  float* out;
};

enum Which {
  kNone,
  kNoBarrierBeforeReading,
  kNoBarrierBeforeOverwriting,
  kNoWarpBarrier,
  kNotWaitedFor,
  kCopiedTooEarly,
  kBeyondSharedMemory,
  kBeyondTheResult,
  kBarrierOfSome,
  kInstructionOfSome,
  kUnalignedRow,
};

void kernel(Fault p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, other = thread ^ kWarp, neighbour = thread ^ 1;
  shared[thread] = static_cast<float>(thread);
  if (p.which != kNoBarrierBeforeReading) __syncthreads();
  float found = shared[other];
  if (p.which != kNoBarrierBeforeOverwriting) __syncthreads();
  shared[thread] = found;
  __syncthreads();
  found = shared[other];

  __syncthreads();
  shared[thread] = found;
  if (p.which != kNoWarpBarrier) __syncwarp();
  found = shared[neighbour];
  __syncwarp();
  shared[neighbour] = found;
  __syncthreads();

  if (thread % 4 == 0) copy_16(shared + kThreads + thread, p.out + kThreads + thread, true);
  end_copies();
  if (p.which != kNotWaitedFor) wait_for_copies<0>();
  __syncthreads();
  found = shared[thread] + shared[kThreads + thread];
  wait_for_copies<0>();
  __syncthreads();
  found += 2 * (shared[other] - static_cast<float>(other));
  if (p.which != kCopiedTooEarly) __syncthreads();
  if (thread % 4 == 0) copy_16(shared + thread, p.out + kThreads + thread, true);
  end_copies();
  __syncthreads();
  wait_for_copies<0>();

  if (p.which == kBeyondSharedMemory) found += shared[2 * kThreads + thread];
  if (p.which == kBarrierOfSome && thread < kWarp) __syncthreads();
  if (p.which == kInstructionOfSome && thread % 2) __syncwarp();
  if (p.which == kUnalignedRow) {
    uint32_t values[4];
    load_matrices(values, shared + thread % 8);
  }
  p.out[p.which == kBeyondTheResult ? 2 * kThreads + thread : thread] = found;
}

}  // namespace
}  // namespace fk

// The first 64 values of a result with 128, of which the last 64 are zeros.
extern "C" __attribute__((visibility("default"))) void fk_fault(int which, float* to) {
  std::vector<float> out(2 * fk::kThreads);
  fk::launch_kernel(fk::kernel, 1, fk::kThreads, 2 * fk::kThreads * sizeof(float), nullptr,
                    fk::Fault{which, out.data()});
  std::copy_n(out.data(), fk::kThreads, to);
}
