// One kernel text, two targets: CUDA under nvcc, and under any C++20 compiler an emulator that
// runs the threads of a block as fibers (../cpu/fibers.h).  The emulator is for tests.
#pragma once
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define MG_KERNEL __global__ void
#define MG_DEVICE __device__ __forceinline__
#define MG_BOTH __host__ __device__ __forceinline__
// An argument that all threads read where it lies, whatever its index.
#define MG_GRID_CONSTANT __grid_constant__
// Shared memory of a block: an array, uninitialised.
#define MG_SHARED(type, name, count) __shared__ type name[count]
#define MG_LAUNCH(kernel, grid, block, stream, ...)       \
  do {                                                    \
    kernel<<<grid, block, 0, stream>>>(__VA_ARGS__);      \
    mg::check_launch(cudaGetLastError());                 \
  } while (0)
// For kernels without barriers or shuffles, which the emulator runs without fibers.
#define MG_LAUNCH_FLAT MG_LAUNCH
#define MG_EMULATED 0
// Threads of a block: fewer in the emulator, but more than one warp.
#define MG_THREADS(device, emulated) (device)
namespace mg {
using Stream = cudaStream_t;
inline void check_launch(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA launch failed: ") + cudaGetErrorString(error));
}
}  // namespace mg
#else
#include "../cpu/fibers.h"
#endif

namespace mg {
using Half = c10::Half;
using BFloat16 = c10::BFloat16;

// What a type is computed in.
template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <class T> using acc_t = typename Accumulator<T>::type;

MG_DEVICE float exp_(float x) { return expf(x); }
MG_DEVICE double exp_(double x) { return exp(x); }
MG_DEVICE float sqrt_(float x) { return sqrtf(x); }
MG_DEVICE double sqrt_(double x) { return sqrt(x); }
MG_DEVICE float max_(float a, float b) { return fmaxf(a, b); }
MG_DEVICE double max_(double a, double b) { return fmax(a, b); }
#if defined(__CUDACC__)
MG_DEVICE float rsqrt_(float x) { return rsqrtf(x); }
#else
MG_DEVICE float rsqrt_(float x) { return 1.0f / sqrtf(x); }
#endif
MG_DEVICE double rsqrt_(double x) { return 1.0 / sqrt(x); }

// A product that no sum swallows, so that it is the same wherever it is made.
#if defined(__CUDACC__)
MG_DEVICE float times(float x, float y) { return __fmul_rn(x, y); }
#else
MG_DEVICE float times(float x, float y) { return x * y; }
#endif
MG_DEVICE double times(double x, double y) { return x * y; }

// exp and 1 / x for results that are rounded to T.  For 16 bits a GPU's own approximations do,
// wrong by some 2^-21: with the exact ones arithmetic would take longer than memory does.
template <class T> MG_DEVICE acc_t<T> exp_for(acc_t<T> x) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2) return __expf(x);
#endif
  return exp_(x);
}
template <class T> MG_DEVICE acc_t<T> inverse_for(acc_t<T> x) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, x);
#endif
  return acc_t<T>(1) / x;
}
template <class A> MG_DEVICE A minus_infinity() { return A(-INFINITY); }

MG_DEVICE int lane() { return threadIdx.x & 31; }
MG_DEVICE int warp() { return threadIdx.x >> 5; }
}  // namespace mg
