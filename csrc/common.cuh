// What every kernel shares: number types, vector loads, warp sums and launches.
//
// The kernels know nothing of torch. With -DPOLYFUSION_EMULATED the same sources compile as host code.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef POLYFUSION_EMULATED
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// Of an H100. Work is shared out for this many on every device, so that sums never depend on it.
constexpr int multiprocessors = 132;

// Launch and report a refused launch. More than 48 KB of shared memory must be asked for.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t bytes, cudaStream_t stream,
                   const A&... arguments) {
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, bytes, stream>>>(arguments...);
  return cudaGetLastError();
}
#endif

namespace polyfusion {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

__host__ __device__ constexpr int divide_up(int64_t a, int b) {
  return static_cast<int>((a + b - 1) / b);
}
__host__ __device__ constexpr int round_up(int64_t a, int b) { return divide_up(a, b) * b; }

}  // namespace polyfusion
