// CUDA's execution model on a host, for tests: a block's threads are fibers of one host thread. Blocks run one after
// another. Each warp runs as far ahead of the others as it can, and each lane ahead of its warp, so that a barrier
// that is missing shows; `fk_emulator_reverse` makes the last ones go first instead of the first ones.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

namespace fk {

using bf16 = c10::BFloat16;
using f16 = c10::Half;
using std::max;
using std::min;

struct Index {
  int x;
};
extern Index threadIdx, blockIdx, blockDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __bfloat162float(bf16 x) { return x; }
inline float __half2float(f16 x) { return x; }
inline bf16 __float2bfloat16_rn(float x) { return x; }
inline f16 __float2half_rn(float x) { return x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// The block's shared memory: as many bytes as were asked for, each of them 0xFF.
unsigned char* shared_memory();

void __syncthreads();
void __syncwarp();
float __shfl_sync(unsigned mask, float value, int lane);
float __shfl_xor_sync(unsigned mask, float value, int step);

// The twins of ptx.h.
void load_matrices(uint32_t (&to)[4], const void* row);
void load_matrices_transposed(uint32_t (&to)[4], const void* row);
void multiply_bf16(float (&to)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void multiply_f16(float (&to)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// Where the last threads go first, copies are made when they are waited for, and not before: an early reader finds what
// was there. Otherwise they are made at once: a late reader of what was there finds them.
void copy_16(void* to, const void* from, bool valid);
void end_copies();
void wait_for_copies(int left);
template <int kLeft>
void wait_for_copies() {
  wait_for_copies(kLeft);
}
inline int unknown(int value) { return value; }

const char* shared_memory_of_device(int64_t* to);
const char* multiprocessors_of_device(int64_t* to);

void run_grid(int64_t blocks, int threads, int64_t shared, const std::function<void()>& kernel);

template <class Params>
const char* launch_kernel(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared, void*,
                          const Params& params) {
  run_grid(blocks, threads, shared, [&] { kernel(params); });
  return nullptr;
}

}  // namespace fk
