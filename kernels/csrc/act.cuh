// Activations of the MLP, forward and backward: SwiGLU, and bias + GELU (tanh form).
#pragma once
#include "common/reduce.h"

namespace mg {

// A thread's elements: V of them from `column` on, in every gridDim.y-th row.
#define MG_FOR_MY_ROWS(row, rows) for (int64_t row = blockIdx.y; row < (rows); row += gridDim.y)

// out = silu(gate) * up, with gate and up the halves of each row [2 n].
template <class T, int V, int NT>
MG_KERNEL __launch_bounds__(NT)
swiglu_forward(const T* __restrict__ x, T* __restrict__ out, int64_t rows, int n) {
  using A = acc_t<T>;
  const int i = blockIdx.x * NT + threadIdx.x;
  if (i >= n / V) return;
  MG_FOR_MY_ROWS(row, rows) {
    const Vec<T, V> gate = load<V>(x + row * 2 * n, i), up = load<V>(x + row * 2 * n + n, i);
    Vec<T, V> o;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A g = A(gate.v[k]);
      o.v[k] = T(g / (A(1) + exp_(-g)) * A(up.v[k]));
    }
    store(out + row * n, i, o);
  }
}

// silu is computed again rather than kept.
template <class T, int V, int NT>
MG_KERNEL __launch_bounds__(NT)
swiglu_backward(const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ dx,
                int64_t rows, int n) {
  using A = acc_t<T>;
  const int i = blockIdx.x * NT + threadIdx.x;
  if (i >= n / V) return;
  MG_FOR_MY_ROWS(row, rows) {
    const Vec<T, V> d = load<V>(grad + row * n, i);
    const Vec<T, V> gate = load<V>(x + row * 2 * n, i), up = load<V>(x + row * 2 * n + n, i);
    Vec<T, V> d_gate, d_up;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A g = A(gate.v[k]), s = A(1) / (A(1) + exp_(-g)), o = A(d.v[k]);
      d_gate.v[k] = T(o * A(up.v[k]) * s * (A(1) + g * (A(1) - s)));
      d_up.v[k] = T(o * g * s);
    }
    store(dx + row * 2 * n, i, d_gate);
    store(dx + row * 2 * n + n, i, d_up);
  }
}

// sqrt(2 / pi), and the cubic's coefficient (Hendrycks & Gimpel, arXiv 1606.08415).
#define MG_GELU_ALPHA 0.79788456080286535588
#define MG_GELU_CUBIC 0.044715

template <class A> MG_DEVICE A gelu(A x) {
  return A(0.5) * x * (A(1) + tanh_(A(MG_GELU_ALPHA) * (x + A(MG_GELU_CUBIC) * x * x * x)));
}
template <class A> MG_DEVICE A gelu_slope(A x) {
  const A t = tanh_(A(MG_GELU_ALPHA) * (x + A(MG_GELU_CUBIC) * x * x * x));
  const A inner = A(MG_GELU_ALPHA) * (A(1) + A(3 * MG_GELU_CUBIC) * x * x);
  return A(0.5) * (A(1) + t) + A(0.5) * x * (A(1) - t * t) * inner;
}

template <class T, int V, int NT>
MG_KERNEL __launch_bounds__(NT)
bias_gelu_forward(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ out,
                  int64_t rows, int n) {
  using A = acc_t<T>;
  const int i = blockIdx.x * NT + threadIdx.x;
  if (i >= n / V) return;
  const Vec<T, V> b = load<V>(bias, i);
  MG_FOR_MY_ROWS(row, rows) {
    Vec<T, V> a = load<V>(x + row * n, i);
#pragma unroll
    for (int k = 0; k < V; ++k) a.v[k] = T(gelu(A(a.v[k]) + A(b.v[k])));
    store(out + row * n, i, a);
  }
}

// The bias's gradient comes out of the same pass: row blockIdx.y of `db_part` [gridDim.y, n].
template <class T, int V, int NT>
MG_KERNEL __launch_bounds__(NT)
bias_gelu_backward(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ bias,
                   T* __restrict__ dx, acc_t<T>* __restrict__ db_part, int64_t rows, int n) {
  using A = acc_t<T>;
  const int i = blockIdx.x * NT + threadIdx.x;
  if (i >= n / V) return;
  const Vec<T, V> b = load<V>(bias, i);
  A db[V];
#pragma unroll
  for (int k = 0; k < V; ++k) db[k] = 0;
  MG_FOR_MY_ROWS(row, rows) {
    const Vec<T, V> d = load<V>(grad + row * n, i), a = load<V>(x + row * n, i);
    Vec<T, V> o;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A g = A(d.v[k]) * gelu_slope(A(a.v[k]) + A(b.v[k]));
      o.v[k] = T(g);
      db[k] += g;
    }
    store(dx + row * n, i, o);
  }
#pragma unroll
  for (int k = 0; k < V; ++k) db_part[(int64_t)blockIdx.y * n + (int64_t)i * V + k] = db[k];
}
}  // namespace mg
