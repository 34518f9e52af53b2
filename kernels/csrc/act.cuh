// Activations of the MLP, forward and backward: SwiGLU, and bias + GELU (tanh form).
#pragma once
#include "common/reduce.h"

namespace mg {

template <class T> MG_DEVICE acc_t<T> logistic(acc_t<T> x) {
  return inverse_for<T>(acc_t<T>(1) + exp_for<T>(-x));
}

// A thread's elements: V of them in every gridDim.y-th row; two rows are under way at a time.
#define MG_FOR_MY_ROWS(row, rows) \
  _Pragma("unroll 2") for (int64_t row = blockIdx.y; row < (rows); row += gridDim.y)

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
      o.v[k] = T(g * logistic<T>(g) * A(up.v[k]));
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
      const A g = A(gate.v[k]), s = logistic<T>(g), o = A(d.v[k]);
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

// (1 + tanh(u)) / 2 is the logistic function of 2 u, which takes one exp.
template <class T> MG_DEVICE acc_t<T> gelu_gate(acc_t<T> x) {
  using A = acc_t<T>;
  return logistic<T>(A(2 * MG_GELU_ALPHA) * (x + A(MG_GELU_CUBIC) * x * x * x));
}
template <class T> MG_DEVICE acc_t<T> gelu(acc_t<T> x) { return x * gelu_gate<T>(x); }
template <class T> MG_DEVICE acc_t<T> gelu_slope(acc_t<T> x) {
  using A = acc_t<T>;
  const A s = gelu_gate<T>(x);
  const A inner = A(2 * MG_GELU_ALPHA) * (A(1) + A(3 * MG_GELU_CUBIC) * x * x);
  return s + x * s * (A(1) - s) * inner;
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
    for (int k = 0; k < V; ++k) a.v[k] = T(gelu<T>(A(a.v[k]) + A(b.v[k])));
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
      const A g = A(d.v[k]) * gelu_slope<T>(A(a.v[k]) + A(b.v[k]));
      o.v[k] = T(g);
      db[k] += g;
    }
    store(dx + row * n, i, o);
  }
#pragma unroll
  for (int k = 0; k < V; ++k) db_part[(int64_t)blockIdx.y * n + (int64_t)i * V + k] = db[k];
}
}  // namespace mg
