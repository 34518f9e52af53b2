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

// Copies `n` vectors of V elements, several loads of a thread under way at a time.
template <class T, class L, int V, int NT>
MG_DEVICE void copy_vectors(const Box& b, int64_t n) {
  using A = acc_t<T>;
  constexpr int kTogether = 4;
  const A scale = A(b.scale);
  for (int64_t first = (int64_t)blockIdx.x * NT * kTogether; first < n;
       first += (int64_t)gridDim.x * NT * kTogether) {
    Vec<T, V> x[kTogether];
    int64_t to[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      int64_t rest = first + u * NT + (int)threadIdx.x, from = 0;
      to[u] = -1;
      if (rest >= n) continue;
      to[u] = 0;
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
        to[u] += at * b.target_stride[a];
      }
      x[u] = load<V>((const T*)b.source, from);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (to[u] < 0) continue;
      Vec<L, V> copy;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        x[u].v[k] = T(A(x[u].v[k]) * scale);
        copy.v[k] = L(x[u].v[k]);
      }
      store((T*)b.target, to[u], x[u]);
      if (b.low) store((L*)b.low, to[u], copy);
    }
  }
}

// Row blockIdx.y of the grid copies box blockIdx.y.
template <class T, class L, int NT>
MG_KERNEL __launch_bounds__(NT) copy_boxes(MG_GRID_CONSTANT const Boxes boxes) {
  const Box& b = boxes.box[blockIdx.y];
  const int64_t n = (int64_t)b.size[0] * b.size[1] * b.size[2] * b.size[3];
  if (b.wide)
    copy_vectors<T, L, kWide<T>, NT>(b, n);
  else
    copy_vectors<T, L, 1, NT>(b, n);
}
}  // namespace mg
