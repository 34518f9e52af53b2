// Cross entropy over a vocabulary that ranks share out: two local passes over the logits, with
// one small reduction over the ranks between them.  One block a row; rows may begin at any
// element, since a vocabulary need not be even.
#pragma once
#include "common/reduce.h"

namespace mg {

// The elements of a row that come before its first whole 16 bytes.
template <class T> MG_DEVICE int unaligned_head(const T* row, int n) {
  const int past = (int)((reinterpret_cast<uintptr_t>(row) / sizeof(T)) % kWide<T>);
  const int head = past ? kWide<T> - past : 0;
  return head < n ? head : n;
}

// stats [3, rows]: the row's greatest logit, the sum of exp(logit - greatest), and the logit at
// the label, or 0 where it is not among these columns.
template <class T, int NT>
MG_KERNEL __launch_bounds__(NT)
softmax_stats(const T* __restrict__ logits, const int64_t* __restrict__ labels, int64_t start,
              acc_t<T>* __restrict__ stats, int64_t rows, int n) {
  using A = acc_t<T>;
  constexpr int V = kWide<T>;
  const A none = minus_infinity<A>();
  MG_SHARED(Pair<A>, shared, 32);
  const T* row = logits + (int64_t)blockIdx.x * n;
  Pair<A> mine{none, A(0)};
  const int head = unaligned_head(row, n), vectors = (n - head) / V;
  for (int i = threadIdx.x; i < head; i += NT) mine = MergeSoftmax{}(mine, Pair<A>{A(row[i]), A(1)});
  const auto add = [&](const Vec<T, V>& x) {
    A top = mine.a;
#pragma unroll
    for (int k = 0; k < V; ++k) top = max_(top, A(x.v[k]));
    if (top == none) return;
    if (top > mine.a) mine = {top, mine.b * exp_for<T>(mine.a - top)};
#pragma unroll
    for (int k = 0; k < V; ++k) mine.b += exp_for<T>(A(x.v[k]) - top);
  };
  // Two loads are under way at a time.
  int i = threadIdx.x;
  for (; i + NT < vectors; i += 2 * NT) {
    const Vec<T, V> x = load<V>(row + head, i), y = load<V>(row + head, i + NT);
    add(x), add(y);
  }
  if (i < vectors) add(load<V>(row + head, i));
  for (i = head + vectors * V + threadIdx.x; i < n; i += NT)
    mine = MergeSoftmax{}(mine, Pair<A>{A(row[i]), A(1)});
  mine = block_reduce<NT>(mine, MergeSoftmax{}, Pair<A>{none, A(0)}, shared);
  if (threadIdx.x == 0) {
    const int64_t at = labels[blockIdx.x] - start;
    stats[blockIdx.x] = mine.a;
    stats[rows + blockIdx.x] = mine.b;
    stats[2 * rows + blockIdx.x] = at >= 0 && at < n ? A(row[at]) : A(0);
  }
}

// out = grad * (exp(logit - top) / total, less 1 at the label); `out` may be `logits` itself.
template <class T, int NT>
MG_KERNEL __launch_bounds__(NT)
softmax_gradient(const acc_t<T>* __restrict__ grads, const T* logits,
                 const int64_t* __restrict__ labels, const acc_t<T>* __restrict__ stats,
                 int64_t start, T* out, int64_t rows, int n) {
  using A = acc_t<T>;
  constexpr int V = kWide<T>;
  const int64_t at = (int64_t)blockIdx.x * n, label = labels[blockIdx.x] - start;
  const T* row = logits + at;
  T* to = out + at;
  const A grad = grads[blockIdx.x], top = stats[blockIdx.x];
  const A factor = grad / stats[rows + blockIdx.x];
  const int head = unaligned_head(row, n), vectors = (n - head) / V;
  const auto value = [&](T x, int i) {
    const A p = exp_for<T>(A(x) - top) * factor;
    return T(i == label ? p - grad : p);
  };
  for (int i = threadIdx.x; i < head; i += NT) to[i] = value(row[i], i);
  const auto put = [&](Vec<T, V> x, int i) {
#pragma unroll
    for (int k = 0; k < V; ++k) x.v[k] = value(x.v[k], head + i * V + k);
    store(to + head, i, x);
  };
  int i = threadIdx.x;
  for (; i + NT < vectors; i += 2 * NT) {
    const Vec<T, V> x = load<V>(row + head, i), y = load<V>(row + head, i + NT);
    put(x, i), put(y, i + NT);
  }
  if (i < vectors) put(load<V>(row + head, i), i);
  for (i = head + vectors * V + threadIdx.x; i < n; i += NT) to[i] = value(row[i], i);
}
}  // namespace mg
