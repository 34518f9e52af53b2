// Decoupled AdamW (Loshchilov & Hutter, arXiv 1711.05101) over a flat partition, in one pass:
// low-precision gradient, clipping factor, fp32 master and moments, low-precision copy.
//
// Boxes of the partition may hold young elements, with a rate and a step count of their own:
// inside a box all but the old block is young, and the old block is an arithmetic progression on
// each axis.
#pragma once
#include "common/vec.h"

namespace mg {
constexpr int kAxes = 4;  // of a box; fewer are padded in front with 1

// A row of the table of young boxes, all int64: sorted by start, without overlap.
struct YoungBox {
  int64_t start, volume;
  int64_t size[kAxes];
  int64_t begin[kAxes], step[kAxes], count[kAxes];  // the old block; count 0: all is young
};
inline constexpr int kYoungColumns = sizeof(YoungBox) / sizeof(int64_t);

// What differs between old and young elements.
struct Rate {
  float lr, step_size, root_correction;  // step_size = lr / (1 - beta1^t)
};

struct AdamW {
  float beta1, beta2, eps, weight_decay;
  Rate rate;
};

// Walks over flat positions one by one, and knows each one's rate.
struct Cursor {
  const YoungBox* young;
  const Rate* rates;
  int boxes, box;  // the last one that begins at or before the position; -1 before all
  bool inside;     // whether the position is in it
  int coordinate[kAxes];

  MG_DEVICE Cursor(const YoungBox* young, const Rate* rates, int boxes, int64_t i)
      : young(young), rates(rates), boxes(boxes), box(-1), inside(false) {
    int low = 0, high = boxes;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (young[middle].start > i) high = middle; else low = middle + 1;
    }
    box = low - 1;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) coordinate[a] = 0;
    if (box >= 0 && i < young[box].start + young[box].volume) enter(i);
  }

  MG_DEVICE void enter(int64_t i) {
    uint32_t rest = (uint32_t)(i - young[box].start);
    inside = true;
#pragma unroll
    for (int a = kAxes - 1; a > 0; --a) {
      const uint32_t size = (uint32_t)young[box].size[a], quotient = rest / size;
      coordinate[a] = (int)(rest - quotient * size);
      rest = quotient;
    }
    coordinate[0] = (int)rest;
  }

  MG_DEVICE bool is_old() const {
    bool old = true;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const int from = coordinate[a] - (int)young[box].begin[a], step = (int)young[box].step[a];
      old = old && from >= 0 && from < step * (int)young[box].count[a] &&
            (step == 1 || from % step == 0);
    }
    return old;
  }

  // The rate of position i; to be asked for in steps of one.
  MG_DEVICE Rate next(int64_t i, Rate usual) {
    if (inside && i >= young[box].start + young[box].volume) inside = false;
    if (!inside && box + 1 < boxes && i >= young[box + 1].start) ++box, enter(i);
    if (!inside) return usual;
    const Rate rate = is_old() ? usual : rates[box];
    bool carry = true;
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      coordinate[a] += carry;
      carry = carry && a > 0 && coordinate[a] == (int)young[box].size[a];
      if (carry) coordinate[a] = 0;
    }
    return rate;
  }
};

MG_DEVICE void update(float& p, float grad, float& m, float& v, const Rate& rate, const AdamW& o) {
  m = m + (1.0f - o.beta1) * (grad - m);
  v = o.beta2 * v + (1.0f - o.beta2) * grad * grad;
  p = p * (1.0f - rate.lr * o.weight_decay) -
      rate.step_size * m / (sqrt_(v) / rate.root_correction + o.eps);
}

// G the gradient's type, L the low-precision copy's; V elements a thread at a time.
template <class G, class L, int V, int NT, bool YOUNG>
MG_KERNEL __launch_bounds__(NT)
adamw(float* __restrict__ parameter, const G* __restrict__ gradient, float* __restrict__ exp_avg,
      float* __restrict__ exp_avg_sq, L* __restrict__ low, const float* __restrict__ scale,
      const YoungBox* __restrict__ young, const Rate* __restrict__ rates, int boxes, int64_t n,
      AdamW o) {
  const float clip = scale ? *scale : 1.0f;
  const int64_t vectors = n / V;
  for (int64_t j = (int64_t)blockIdx.x * NT + threadIdx.x; j < vectors;
       j += (int64_t)gridDim.x * NT) {
    const Vec<G, V> g = load<V>(gradient, j);
    Vec<float, V> p = load<V>(parameter, j), m = load<V>(exp_avg, j), v = load<V>(exp_avg_sq, j);
    Vec<L, V> copy;
    Cursor cursor(young, rates, YOUNG ? boxes : 0, j * V);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Rate rate = YOUNG ? cursor.next(j * V + k, o.rate) : o.rate;
      update(p.v[k], float(g.v[k]) * clip, m.v[k], v.v[k], rate, o);
      copy.v[k] = L(p.v[k]);
    }
    store(parameter, j, p), store(exp_avg, j, m), store(exp_avg_sq, j, v);
    if (low) store(low, j, copy);
  }
  // What is left of the last vector, an element a thread.
  const int64_t i = vectors * V + threadIdx.x;
  if (blockIdx.x == 0 && i < n) {
    Cursor cursor(young, rates, YOUNG ? boxes : 0, i);
    const Rate rate = YOUNG ? cursor.next(i, o.rate) : o.rate;
    float p = parameter[i], m = exp_avg[i], v = exp_avg_sq[i];
    update(p, float(gradient[i]) * clip, m, v, rate, o);
    parameter[i] = p, exp_avg[i] = m, exp_avg_sq[i] = v;
    if (low) low[i] = L(p);
  }
}
}  // namespace mg
