// Copy many boxes with scaling in one launch: from staging memory into parameters, moments and
// low-precision copies.  Each value is read once.
#pragma once
#include "common/vec.h"

namespace mg {
constexpr int kBoxAxes = 4;
constexpr int kBoxesALaunch = 32;  // as a kernel's arguments may have 4 KiB

struct Box {
  const void* source;
  void* target;
  void* low;  // or null
  double scale;
  int64_t target_stride[kBoxAxes], source_stride[kBoxAxes];  // in elements; in vectors if `wide`
  uint32_t size[kBoxAxes];  // the last one in vectors if `wide`
  int wide;                 // whether the last axis is read in vectors
};
struct Boxes {
  Box box[kBoxesALaunch];
};

// Row blockIdx.y of the grid copies box blockIdx.y.
template <class T, class L, int NT>
MG_KERNEL __launch_bounds__(NT) copy_boxes(MG_GRID_CONSTANT const Boxes boxes) {
  using A = acc_t<T>;
  constexpr int V = kWide<T>;
  const Box& b = boxes.box[blockIdx.y];
  const A scale = A(b.scale);
  const int64_t n = (int64_t)b.size[0] * b.size[1] * b.size[2] * b.size[3];
  for (int64_t i = (int64_t)blockIdx.x * NT + threadIdx.x; i < n; i += (int64_t)gridDim.x * NT) {
    int64_t rest = i, from = 0, to = 0;
#pragma unroll
    for (int a = kBoxAxes - 1; a >= 0; --a) {
      int64_t at = rest;
      if (a > 0) {
        // Divisions of 64 bits are slow, and seldom needed.
        const int64_t quotient = rest >> 32 ? rest / b.size[a] : (uint32_t)rest / b.size[a];
        at = rest - quotient * b.size[a];
        rest = quotient;
      }
      from += at * b.source_stride[a];
      to += at * b.target_stride[a];
    }
    if (b.wide) {
      Vec<T, V> x = load<V>((const T*)b.source, from);
      Vec<L, V> copy;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        x.v[k] = T(A(x.v[k]) * scale);
        copy.v[k] = L(x.v[k]);
      }
      store((T*)b.target, to, x);
      if (b.low) store((L*)b.low, to, copy);
    } else {
      const T x = T(A(((const T*)b.source)[from]) * scale);
      ((T*)b.target)[to] = x;
      if (b.low) ((L*)b.low)[to] = L(x);
    }
  }
}
}  // namespace mg
