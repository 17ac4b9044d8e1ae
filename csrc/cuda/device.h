// What kernels need of the language: CUDA's own under nvcc; under a host compiler an emulation, with which the tests
// run the same kernels without a GPU.
#pragma once

#include "params.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fk {

using bf16 = __nv_bfloat16;
using f16 = __half;

// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Null, or what CUDA says of an error, which must not be found again behind the next launch.
inline const char* message_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

inline int64_t shared_memory_of_device() {
  int device = 0, bytes = 0;
  if (message_of(cudaGetDevice(&device))) return 0;
  return message_of(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) ? 0 : bytes;
}

template <class Params>
const char* launch_kernel(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared, void* stream,
                          const Params& params) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more blocks than a grid takes";
  if (shared > 48 * 1024) {
    const char* problem =
        message_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    if (problem) return problem;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)>>>(
      params);
  return message_of(cudaGetLastError());
}

}  // namespace fk
#else
#include "emulator.h"
#endif

namespace fk {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// Two 16-bit values in one register, the first in its lower half.
template <class T>
__device__ inline uint32_t pack(float first, float second) {
  const T values[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t bits;
  memcpy(&bits, values, sizeof(bits));
  return bits;
}

// Arrays that come beside values of dtype T are in T or in fp32.
template <class T>
__device__ inline float load(const Array& array, int64_t index) {
  if (sizeof(T) == 2 && array.dtype != kF32) return to_float(static_cast<const T*>(array.data)[index]);
  return static_cast<const float*>(array.data)[index];
}

template <class T>
__device__ inline float load_or(const Array& array, int64_t index, float otherwise) {
  return array.data ? load<T>(array, index) : otherwise;
}

// Calls `use` with the array's values as `const T*` or as `const float*`; not at all when it is absent.
template <class T, class Use>
__device__ inline void with_values(const Array& array, const Use& use) {
  if (!array.data) return;
  if (sizeof(T) == 2 && array.dtype != kF32)
    use(static_cast<const T*>(array.data));
  else
    use(static_cast<const float*>(array.data));
}

// Into memory of T or fp32.
template <class T>
__device__ inline void store(void* data, DType dtype, int64_t index, float value) {
  if (sizeof(T) == 2 && dtype != kF32)
    static_cast<T*>(data)[index] = from_float<T>(value);
  else
    static_cast<float*>(data)[index] = value;
}

// How many parts of this size there are, the last one perhaps smaller.
__host__ __device__ constexpr int parts(int64_t size, int part) { return static_cast<int>((size + part - 1) / part); }
__host__ __device__ constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

constexpr int kWarp = 32;
constexpr float kLog2E = 1.4426950408889634f;

__device__ inline int lane_index() { return threadIdx.x % kWarp; }
__device__ inline int warp_index() { return threadIdx.x / kWarp; }

// The sum over a warp, in every lane.
__device__ inline float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

}  // namespace fk
