// Reductions over a warp, a block and the rows of a matrix of partial sums.
#pragma once
#include "vec.h"

namespace mg {
template <class A> struct Pair { A a, b; };

MG_DEVICE float shuffle(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
MG_DEVICE double shuffle(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
template <class A> MG_DEVICE Pair<A> shuffle(Pair<A> x, int mask) {
  return {shuffle(x.a, mask), shuffle(x.b, mask)};
}

struct Add {
  MG_DEVICE float operator()(float x, float y) const { return x + y; }
  MG_DEVICE double operator()(double x, double y) const { return x + y; }
  template <class A> MG_DEVICE Pair<A> operator()(Pair<A> x, Pair<A> y) const {
    return {x.a + y.a, x.b + y.b};
  }
};

// Softmax statistics: a the greatest logit, b the sum of exp(logit - a).
struct MergeSoftmax {
  template <class A> MG_DEVICE Pair<A> operator()(Pair<A> x, Pair<A> y) const {
    const A top = max_(x.a, y.a);
    if (top == minus_infinity<A>()) return {top, A(0)};
    return {top, x.b * exp_(x.a - top) + y.b * exp_(y.a - top)};
  }
};

// All lanes receive the result.
template <class P, class Op> MG_DEVICE P warp_reduce(P x, Op op) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) x = op(x, shuffle(x, mask));
  return x;
}

// All threads receive the result; `shared` has 32 places and may be used again afterwards.
template <int NT, class P, class Op> MG_DEVICE P block_reduce(P x, Op op, P none, P* shared) {
  static_assert(NT % 32 == 0 && NT <= 1024);
  x = warp_reduce(x, op);
  if (lane() == 0) shared[warp()] = x;
  __syncthreads();
  x = lane() < NT / 32 ? shared[lane()] : none;
  x = warp_reduce(x, op);
  __syncthreads();
  return x;
}

template <int NT, class A> MG_DEVICE A block_sum(A x, A* shared) {
  return block_reduce<NT>(x, Add{}, A(0), shared);
}
template <int NT, class A> MG_DEVICE Pair<A> block_sum(Pair<A> x, Pair<A>* shared) {
  return block_reduce<NT>(x, Add{}, Pair<A>{A(0), A(0)}, shared);
}

// Column sums of `partial` [rows, columns]: 32 columns and NT / 32 groups of rows to a block.
template <class T, int NT> MG_KERNEL __launch_bounds__(NT)
sum_rows(const acc_t<T>* __restrict__ partial, T* __restrict__ out, int rows, int64_t columns) {
  using A = acc_t<T>;
  constexpr int kGroups = NT / 32;
  MG_SHARED(A, sums, kGroups * 33);
  const int64_t column = (int64_t)blockIdx.x * 32 + lane();
  A sum = 0;
  if (column < columns)
    for (int r = warp(); r < rows; r += kGroups) sum += partial[(int64_t)r * columns + column];
  sums[warp() * 33 + lane()] = sum;
  __syncthreads();
  if (warp() == 0 && column < columns) {
    sum = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) sum += sums[g * 33 + lane()];
    out[column] = T(sum);
  }
}

template <class T> void launch_sum_rows(const acc_t<T>* partial, T* out, int rows, int64_t columns,
                                        Stream stream) {
  constexpr int NT = MG_THREADS(1024, 64);
  MG_LAUNCH((sum_rows<T, NT>), dim3((unsigned)((columns + 31) / 32)), dim3(NT), stream, partial, out,
            rows, columns);
}
}  // namespace mg
