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

inline const char* attribute_of_device(cudaDeviceAttr attribute, int64_t* to) {
  int device = 0, value = 0;
  if (const char* problem = message_of(cudaGetDevice(&device))) return problem;
  if (const char* problem = message_of(cudaDeviceGetAttribute(&value, attribute, device))) return problem;
  *to = value;
  return nullptr;
}

inline const char* shared_memory_of_device(int64_t* to) {
  return attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin, to);
}
inline const char* multiprocessors_of_device(int64_t* to) {
  return attribute_of_device(cudaDevAttrMultiProcessorCount, to);
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

template <class T>
__device__ inline float2 unpack(uint32_t bits) {
  T values[2];
  memcpy(values, &bits, sizeof(bits));
  return make_float2(to_float(values[0]), to_float(values[1]));
}

// Two neighbouring values from and to a place that is a multiple of their size, in one access: a compiler that knows
// no alignment takes them apart.
template <class T>
__device__ inline float2 load_pair(const T* from) {
  return unpack<T>(*reinterpret_cast<const uint32_t*>(from));
}
template <>
__device__ inline float2 load_pair(const float* from) {
  return *reinterpret_cast<const float2*>(from);
}

template <class T>
__device__ inline void store_pair(T* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
}
template <>
__device__ inline void store_pair(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}

// Values that a thread reads or writes at once, from and to multiples of 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ inline void load_vector(float (&to)[kVector<T>], const T* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(words[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}
// As many from fp32 as a vector of T has.
template <class T>
__device__ inline void load_vector(float (&to)[kVector<T>], const float* from) {
#pragma unroll
  for (int i = 0; i < kVector<T>; i += 4) {
    const float4 values = *reinterpret_cast<const float4*>(from + i);
    to[i] = values.x;
    to[i + 1] = values.y;
    to[i + 2] = values.z;
    to[i + 3] = values.w;
  }
}

template <class T>
__device__ inline void store_vector(T* to, const float (&values)[kVector<T>]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                                             pack<T>(values[4], values[5]), pack<T>(values[6], values[7]));
}
template <>
__device__ inline void store_vector(float* to, const float (&values)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
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

// `count` of a vector's values of an array, from `index` on, and zeros behind them. With `vectors` the array begins at
// a multiple of 16 bytes, the index is a multiple of a vector, and all values are there or none.
template <class T>
__device__ inline void load_values(float (&to)[kVector<T>], const Array& array, int64_t index, int count,
                                   bool vectors) {
  if (!vectors || count <= 0) {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) to[i] = i < count ? load<T>(array, index + i) : 0.0f;
    return;
  }
  with_values<T>(array, [&](const auto* values) { load_vector<T>(to, values + index); });
}

// Into memory of T or fp32.
template <class T>
__device__ inline void store(void* data, DType dtype, int64_t index, float value) {
  if (sizeof(T) == 2 && dtype != kF32)
    static_cast<T*>(data)[index] = from_float<T>(value);
  else
    static_cast<float*>(data)[index] = value;
}

// As `load_values`.
template <class T>
__device__ inline void store_values(void* data, DType dtype, int64_t index, const float (&values)[kVector<T>],
                                    int count, bool vectors) {
  if (!vectors) {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      if (i < count) store<T>(data, dtype, index + i, values[i]);
    return;
  }
  if (count <= 0) return;
  if (sizeof(T) == 2 && dtype != kF32) {
    store_vector(static_cast<T*>(data) + index, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; i += 4) {
    const float own[4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
    store_vector(static_cast<float*>(data) + index + i, own);
  }
}

// How many parts of this size there are, the last one perhaps smaller.
__host__ __device__ constexpr int parts(int64_t size, int part) { return static_cast<int>((size + part - 1) / part); }
__host__ __device__ constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

constexpr int kWarp = 32;
constexpr float kLog2E = 1.4426950408889634f;

__device__ inline int lane_index() { return threadIdx.x % kWarp; }
__device__ inline int warp_index() { return threadIdx.x / kWarp; }

// The sum over each `kLanes` neighbouring lanes, in all of them.
template <int kLanes = kWarp>
__device__ inline float warp_sum(float x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

}  // namespace fk
