// Rotary position embedding (Su et al., arXiv 2104.09864) of the query and key heads of a packed
// projection: feature i of a head's first half and feature i of its second turn together.
#pragma once
#include "common/vec.h"

namespace mg {

// x [tokens, groups, heads, 2 half]: of each group the first `turned` heads are turned by their
// token's position (token % sequence), the others copied, or left alone where out is x itself.
// cos and sin [sequence, half].  One block a token.
template <class T, int V, int NT>
MG_KERNEL __launch_bounds__(NT)
rotate(const T* x, T* out, const acc_t<T>* __restrict__ cos, const acc_t<T>* __restrict__ sin,
       int sequence, int groups, int heads, int turned, int half, bool back) {
  using A = acc_t<T>;
  const int64_t token = blockIdx.x;
  const A* c = cos + (token % sequence) * half;
  const A* s = sin + (token % sequence) * half;
  const bool in_place = x == out;
  const int vectors = half / V, here = in_place ? turned : heads, count = groups * here * vectors;
  for (int i = threadIdx.x; i < count; i += NT) {
    const int v = i % vectors, rest = i / vectors, head = rest % here, group = rest / here;
    const int64_t at = ((token * groups + group) * heads + head) * 2 * half;
    Vec<T, V> a = load<V>(x + at, v), b = load<V>(x + at + half, v);
    if (head < turned) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A cosine = c[v * V + k], sine = back ? -s[v * V + k] : s[v * V + k];
        const A first = A(a.v[k]), second = A(b.v[k]);
        a.v[k] = T(first * cosine - second * sine);
        b.v[k] = T(second * cosine + first * sine);
      }
    }
    store(out + at, v, a);
    store(out + at + half, v, b);
  }
}
}  // namespace mg
