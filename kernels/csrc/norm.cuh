// Residual add + normalisation of rows, forward and backward.
//
//   z = x + residual                                   (z = x without a residual)
//   RMSNorm    y = z * rstd * w                        rstd = 1 / sqrt(mean(z^2) + eps)
//   LayerNorm  y = (z - mean) * rstd * w + b           rstd = 1 / sqrt(var(z) + eps)
//
// Sums are taken in fp32 (fp64 for fp64), of z as it is stored.
// One block a row; CH vectors of V elements a thread stay in registers between the passes, or,
// with CH = 0, the row is read again, whatever its length.
#pragma once
#include "common/reduce.h"

namespace mg {

// The vectors of a row that belong to this thread.
#define MG_FOR_MY_VECTORS(c, i, vectors)                                           \
  _Pragma("unroll") for (int c = 0; CH > 0 ? c < CH : c * NT < (vectors); ++c)     \
    if (const int i = c * NT + (int)threadIdx.x; i < (vectors))

template <class T, int V, int NT, int CH, bool CENTER>
MG_KERNEL __launch_bounds__(NT)
norm_forward(const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ w,
             const T* __restrict__ b, T* __restrict__ z, T* __restrict__ y,
             acc_t<T>* __restrict__ means, acc_t<T>* __restrict__ rstds, int n, acc_t<T> eps) {
  using A = acc_t<T>;
  MG_SHARED(A, shared, 32);
  const int64_t at = (int64_t)blockIdx.x * n;
  const int vectors = n / V;
  Vec<T, V> kept[CH > 0 ? CH : 1];
  A sum = 0;
  MG_FOR_MY_VECTORS(c, i, vectors) {
    Vec<T, V> a = load<V>(x + at, i);
    if (residual) {
      const Vec<T, V> r = load<V>(residual + at, i);
#pragma unroll
      for (int k = 0; k < V; ++k) a.v[k] = T(A(a.v[k]) + A(r.v[k]));
      store(z + at, i, a);
    }
    if (CH > 0) kept[CH > 0 ? c : 0] = a;
#pragma unroll
    for (int k = 0; k < V; ++k) sum += CENTER ? A(a.v[k]) : A(a.v[k]) * A(a.v[k]);
  }
  const T* again = residual ? z : x;
  A mean = 0;
  if (CENTER) {
    mean = block_sum<NT>(sum, shared) / A(n);
    sum = 0;
    MG_FOR_MY_VECTORS(c, i, vectors) {
      const Vec<T, V> a = CH > 0 ? kept[CH > 0 ? c : 0] : load<V>(again + at, i);
#pragma unroll
      for (int k = 0; k < V; ++k) sum += (A(a.v[k]) - mean) * (A(a.v[k]) - mean);
    }
  }
  const A rstd = rsqrt_(block_sum<NT>(sum, shared) / A(n) + eps);
  if (threadIdx.x == 0) {
    if (CENTER) means[blockIdx.x] = mean;
    rstds[blockIdx.x] = rstd;
  }
  MG_FOR_MY_VECTORS(c, i, vectors) {
    const Vec<T, V> a = CH > 0 ? kept[CH > 0 ? c : 0] : load<V>(again + at, i);
    const Vec<T, V> g = load<V>(w, i);
    Vec<T, V> h, o;
    if (CENTER) h = load<V>(b, i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A v = (A(a.v[k]) - mean) * rstd * A(g.v[k]);
      o.v[k] = T(CENTER ? v + A(h.v[k]) : v);
    }
    store(y + at, i, o);
  }
}

// With g = dy * w and h = (z - mean) * rstd:
//   dx = rstd * (g - mean(g) - h * mean(g h)) + dz,   mean(g) for LayerNorm alone
//   dw = sum over rows of dy * h,   db = sum over rows of dy
// Each block takes every gridDim.x-th row and leaves its part of dw and db in a row of
// `dw_part` and `db_part` [gridDim.x, n].

// A row's inputs, as far as a thread has them: V elements CH times.
template <class T, int V, int CH> struct NormRow {
  Vec<T, V> dy[CH], z[CH];
  acc_t<T> rstd, mean;
};

// Threads that share a processor's registers; ptxas needs some more of them for sm_100.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define MG_NORM_THREADS(center) ((center) ? 896 : 1024)
#else
#define MG_NORM_THREADS(center) 1024
#endif

template <class T, int V, int NT, int CH, bool CENTER>
MG_KERNEL __launch_bounds__(NT, CH == 1 ? MG_NORM_THREADS(CENTER) / NT : 1)
norm_backward(const T* __restrict__ dy, const T* __restrict__ dz, const T* __restrict__ z,
              const T* __restrict__ w, const acc_t<T>* __restrict__ means,
              const acc_t<T>* __restrict__ rstds, T* __restrict__ dx,
              acc_t<T>* __restrict__ dw_part, acc_t<T>* __restrict__ db_part, int rows, int n) {
  using A = acc_t<T>;
  using Row = NormRow<T, V, CH>;
  MG_SHARED(Pair<A>, shared, 32);
  const int vectors = n / V;
  const auto fetch = [&](int row) {
    const int64_t at = (int64_t)row * n;
    Row in;
    in.rstd = rstds[row], in.mean = CENTER ? means[row] : A(0);
    MG_FOR_MY_VECTORS(c, i, vectors) {
      in.dy[c] = load<V>(dy + at, i), in.z[c] = load<V>(z + at, i);
    }
    return in;
  };
  A dw[CH][V], db[CH][V];
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int k = 0; k < V; ++k) dw[c][k] = db[c][k] = 0;
  Row in = fetch(blockIdx.x);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t at = (int64_t)row * n;
    // The next row is under way while this one is worked on.
    Row next;
    if (row + (int)gridDim.x < rows) next = fetch(row + gridDim.x);
    Pair<A> sums{0, 0};
    MG_FOR_MY_VECTORS(c, i, vectors) {
      const Vec<T, V> gain = load<V>(w, i);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A grad = A(in.dy[c].v[k]), h = (A(in.z[c].v[k]) - in.mean) * in.rstd;
        const A gw = times(grad, A(gain.v[k]));
        sums.a += gw * h;
        dw[c][k] += grad * h;
        if (CENTER) sums.b += gw, db[c][k] += grad;
      }
    }
    Vec<T, V> more[CH];
    if (dz) MG_FOR_MY_VECTORS(c, i, vectors) more[c] = load<V>(dz + at, i);
    sums = block_sum<NT>(sums, shared);
    const A along = sums.a / A(n), shift = CENTER ? sums.b / A(n) : A(0);
    MG_FOR_MY_VECTORS(c, i, vectors) {
      const Vec<T, V> gain = load<V>(w, i);
      Vec<T, V> o;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A h = (A(in.z[c].v[k]) - in.mean) * in.rstd;
        const A gw = times(A(in.dy[c].v[k]), A(gain.v[k]));
        A v = in.rstd * (gw - shift - h * along);
        if (dz) v += A(more[c].v[k]);
        o.v[k] = T(v);
      }
      store(dx + at, i, o);
    }
    in = next;
  }
  const int64_t mine = (int64_t)blockIdx.x * n;
  MG_FOR_MY_VECTORS(c, i, vectors) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      dw_part[mine + (int64_t)i * V + k] = dw[c][k];
      if (CENTER) db_part[mine + (int64_t)i * V + k] = db[c][k];
    }
  }
}

// The same for rows of any length, which are read twice.
template <class T, int NT, bool CENTER>
MG_KERNEL __launch_bounds__(NT)
norm_backward_long(const T* __restrict__ dy, const T* __restrict__ dz, const T* __restrict__ z,
                   const T* __restrict__ w, const acc_t<T>* __restrict__ means,
                   const acc_t<T>* __restrict__ rstds, T* __restrict__ dx,
                   acc_t<T>* __restrict__ dw_part, acc_t<T>* __restrict__ db_part, int rows, int n) {
  using A = acc_t<T>;
  MG_SHARED(Pair<A>, shared, 32);
  const int64_t mine = (int64_t)blockIdx.x * n;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t at = (int64_t)row * n;
    const A rstd = rstds[row], mean = CENTER ? means[row] : A(0);
    const bool first = row == (int)blockIdx.x;
    Pair<A> sums{0, 0};
    for (int i = threadIdx.x; i < n; i += NT) {
      const A grad = A(dy[at + i]), h = (A(z[at + i]) - mean) * rstd, gw = times(grad, A(w[i]));
      sums.a += gw * h;
      // This thread alone writes these columns of the block's row.
      dw_part[mine + i] = grad * h + (first ? A(0) : dw_part[mine + i]);
      if (CENTER) sums.b += gw, db_part[mine + i] = grad + (first ? A(0) : db_part[mine + i]);
    }
    sums = block_sum<NT>(sums, shared);
    const A along = sums.a / A(n), shift = CENTER ? sums.b / A(n) : A(0);
    for (int i = threadIdx.x; i < n; i += NT) {
      const A h = (A(z[at + i]) - mean) * rstd, gw = times(A(dy[at + i]), A(w[i]));
      A v = rstd * (gw - shift - h * along);
      if (dz) v += A(dz[at + i]);
      dx[at + i] = T(v);
    }
  }
}
}  // namespace mg
