// What every launcher needs of libtorch, through its stable ABI alone: checks, streams, dispatch.
#pragma once
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "vec.h"

#if defined(__CUDACC__)
// Declared in a header that a build of torch without CUDA hides.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#define MG_KEY CUDA
#else
#define MG_KEY CPU
#endif
#ifndef MG_NAMESPACE
#define MG_NAMESPACE megagrow
#endif

namespace mg {
using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

// The device and stream of a launch.
struct Place {
  explicit Place([[maybe_unused]] const Tensor& x)
#if MG_EMULATED
  {}
  Stream stream = nullptr;
  int processors = 2;
#else
      : guard_(x.get_device_index()) {
    void* handle = nullptr;
    if (aoti_torch_get_current_cuda_stream(x.get_device_index(), &handle))
      throw std::runtime_error("megagrow: no current CUDA stream");
    stream = static_cast<cudaStream_t>(handle);
    static int known = [] {
      int device = 0, count = 0;
      cudaGetDevice(&device);
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
      return count > 0 ? count : 1;
    }();
    processors = known;
  }
  Stream stream = nullptr;
  int processors = 1;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Blocks of a kernel that the device holds at a time.
template <class Kernel>
unsigned resident_blocks([[maybe_unused]] Kernel kernel, [[maybe_unused]] int threads,
                         const Place& place) {
  int blocks = 2;
#if !MG_EMULATED
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
#endif
  return (unsigned)(std::max(blocks, 1) * place.processors);
}

inline void check(bool good, const char* message) {
  if (!good) throw std::runtime_error(std::string("megagrow: ") + message);
}
inline void check_contiguous(const Tensor& x, const char* name) {
  if (!x.is_contiguous())
    throw std::runtime_error(std::string("megagrow: ") + name + " must be contiguous");
}
inline void check_like(const Tensor& x, const Tensor& like, const char* name) {
  check_contiguous(x, name);
  if (x.scalar_type() != like.scalar_type() || x.numel() != like.numel() ||
      x.get_device_index() != like.get_device_index())
    throw std::runtime_error(std::string("megagrow: ") + name +
                             " must have the type, device and number of elements of the first");
}
template <class T> const T* data(const Tensor& x) { return static_cast<const T*>(x.data_ptr()); }
template <class T> T* out(const Tensor& x) { return static_cast<T*>(x.data_ptr()); }
template <class T> const T* data(const OptionalTensor& x) { return x ? data<T>(*x) : nullptr; }
template <class T> T* out(const OptionalTensor& x) { return x ? out<T>(*x) : nullptr; }

inline int64_t last(const Tensor& x) { return x.dim() ? x.size(x.dim() - 1) : 1; }

inline ScalarType accumulator_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}
inline unsigned at_most(int64_t wanted, int64_t bound) {
  return (unsigned)std::max<int64_t>(1, std::min(wanted, bound));
}

// Calls f(T{}) with the element type.  The emulator serves fp64 as well, for gradcheck.
template <class F> void dispatch(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
#if MG_EMULATED
    case ScalarType::Double: return f(double{});
#endif
    default: throw std::runtime_error("megagrow: the kernels take fp32, bf16 and fp16");
  }
}
}  // namespace mg
