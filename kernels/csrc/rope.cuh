// Rotary position embedding (Su et al., arXiv 2104.09864) of the query and key heads of a packed
// projection: feature i of a head's first half and feature i of its second turn together.
#pragma once
#include "common/vec.h"

namespace mg {

// x [tokens, groups, heads, 2 half]: of each group the first `turned` heads are turned by their
// token's position (token % sequence), the others copied, or left alone where out is x itself.
// cos and sin [sequence, half].  One block a token; a thread turns the same features of several
// heads, so that it reads their angles once.
template <class T, int V, int NT>
MG_KERNEL __launch_bounds__(NT)
rotate(const T* x, T* out, const acc_t<T>* __restrict__ cos, const acc_t<T>* __restrict__ sin,
       int sequence, int groups, int heads, int turned, int half, bool back) {
  using A = acc_t<T>;
  constexpr int W = V < kWide<A> ? V : kWide<A>;  // angles of one access
  const int64_t token = blockIdx.x;
  const A* c = cos + (token % sequence) * half;
  const A* s = sin + (token % sequence) * half;
  const unsigned here = x == out ? turned : heads, count = groups * here, vectors = half / V;
  const unsigned lanes = vectors < NT ? vectors : NT, together = NT / lanes;
  if (threadIdx.x >= together * lanes) return;
  for (unsigned v = threadIdx.x % lanes; v < vectors; v += lanes) {
    A cosine[V], sine[V];
#pragma unroll
    for (int w = 0; w < V / W; ++w) {
      const Vec<A, W> a = load<W>(c + v * V, w), b = load<W>(s + v * V, w);
#pragma unroll
      for (int k = 0; k < W; ++k) cosine[w * W + k] = a.v[k], sine[w * W + k] = back ? -b.v[k] : b.v[k];
    }
    for (unsigned h = threadIdx.x / lanes; h < count; h += together) {
      const unsigned group = h / here, head = h - group * here;
      const int64_t at = ((token * groups + group) * heads + head) * 2 * half;
      Vec<T, V> a = load<V>(x + at, v), b = load<V>(x + at + half, v);
      if (head < (unsigned)turned) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const A first = A(a.v[k]), second = A(b.v[k]);
          a.v[k] = T(first * cosine[k] - second * sine[k]);
          b.v[k] = T(second * cosine[k] + first * sine[k]);
        }
      }
      store(out + at, v, a);
      store(out + at + half, v, b);
    }
  }
}
}  // namespace mg
