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

MG_DEVICE int first_box_after(const YoungBox* young, int boxes, int64_t i) {
  int low = 0, high = boxes;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (young[middle].start > i) high = middle; else low = middle + 1;
  }
  return low;
}

MG_DEVICE bool is_old(const YoungBox& box, const int* coordinate) {
  bool old = true;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int from = coordinate[a] - (int)box.begin[a], step = (int)box.step[a];
    old = old && from >= 0 && from < step * (int)box.count[a] && (step == 1 || from % step == 0);
  }
  return old;
}

MG_DEVICE void locate(const YoungBox& box, int64_t i, int* coordinate) {
  uint32_t rest = (uint32_t)(i - box.start);
#pragma unroll
  for (int a = kAxes - 1; a > 0; --a) {
    const uint32_t size = (uint32_t)box.size[a], quotient = rest / size;
    coordinate[a] = (int)(rest - quotient * size);
    rest = quotient;
  }
  coordinate[0] = (int)rest;
}

MG_DEVICE void advance(const YoungBox& box, int* coordinate) {
#pragma unroll
  for (int a = kAxes - 1; a > 0; --a) {
    if (++coordinate[a] < (int)box.size[a]) return;
    coordinate[a] = 0;
  }
  ++coordinate[0];
}

// G the gradient's type, L the low-precision copy's; V elements a thread at a time.
template <class G, class L, int V, int NT, bool YOUNG>
MG_KERNEL __launch_bounds__(NT)
adamw(float* __restrict__ parameter, const G* __restrict__ gradient, float* __restrict__ exp_avg,
      float* __restrict__ exp_avg_sq, L* __restrict__ low, const float* __restrict__ scale,
      const YoungBox* __restrict__ young, const Rate* __restrict__ rates, int boxes, int64_t n,
      AdamW o) {
  const float clip = scale ? *scale : 1.0f;
  const int64_t vectors = (n + V - 1) / V;
  for (int64_t j = (int64_t)blockIdx.x * NT + threadIdx.x; j < vectors;
       j += (int64_t)gridDim.x * NT) {
    const bool whole = (j + 1) * V <= n;
    const int here = whole ? V : (int)(n - j * V);
    Vec<G, V> g;
    Vec<float, V> p, m, v;
    Vec<L, V> copy;
    if (whole) {
      g = load<V>(gradient, j), p = load<V>(parameter, j);
      m = load<V>(exp_avg, j), v = load<V>(exp_avg_sq, j);
    } else {
      // Unrolled with a condition, so that the vectors stay in registers.
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int64_t i = j * V + k;
        if (k < here)
          g.v[k] = gradient[i], p.v[k] = parameter[i], m.v[k] = exp_avg[i], v.v[k] = exp_avg_sq[i];
      }
    }
    int box = -1, coordinate[kAxes];
    bool inside = false;
    if (YOUNG) {
      box = first_box_after(young, boxes, j * V) - 1;
      inside = box >= 0 && j * V < young[box].start + young[box].volume;
      if (inside) locate(young[box], j * V, coordinate);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (!whole && k >= here) continue;
      Rate rate = o.rate;
      if (YOUNG) {
        const int64_t i = j * V + k;
        if (inside && i >= young[box].start + young[box].volume) inside = false;
        if (!inside && box + 1 < boxes && i >= young[box + 1].start) {
          inside = true, ++box;
          locate(young[box], i, coordinate);
        }
        if (inside) {
          if (!is_old(young[box], coordinate)) rate = rates[box];
          advance(young[box], coordinate);
        }
      }
      const float grad = float(g.v[k]) * clip;
      float x = p.v[k] * (1.0f - rate.lr * o.weight_decay);
      m.v[k] = m.v[k] + (1.0f - o.beta1) * (grad - m.v[k]);
      v.v[k] = o.beta2 * v.v[k] + (1.0f - o.beta2) * grad * grad;
      x -= rate.step_size * m.v[k] / (sqrt_(v.v[k]) / rate.root_correction + o.eps);
      p.v[k] = x;
      copy.v[k] = L(x);
    }
    if (whole) {
      store(parameter, j, p), store(exp_avg, j, m), store(exp_avg_sq, j, v);
      if (low) store(low, j, copy);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int64_t i = j * V + k;
        if (k < here) {
          parameter[i] = p.v[k], exp_avg[i] = m.v[k], exp_avg_sq[i] = v.v[k];
          if (low) low[i] = copy.v[k];
        }
      }
    }
  }
}
}  // namespace mg
