// Decoupled AdamW (Loshchilov & Hutter, arXiv 1711.05101) over a flat partition, in one pass:
// low-precision gradient, clipping factor, fp32 master and moments, low-precision copy.
//
// Boxes of the partition may hold young elements, with a rate and a step count of their own:
// inside a box all but the old block is young, and the old block is an arithmetic progression on
// each axis.  Inside the old block there may be young elements of an earlier growth.
#pragma once
#include "common/vec.h"

namespace mg {
constexpr int kAxes = 4;  // of a box; fewer are padded in front with 1

// A row of the table of young boxes, all int64: sorted by start, without overlap.  Rows of one
// start have one shape; the old block of each lies inside that of the next, and the last row that
// an element is young in counts.
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
  int boxes, box;  // the last one that was entered; -1 before all
  int64_t start, stop;  // of that one
  // On the last axis: the coordinate, the axis's length, and the old block.
  int at, size, begin, step, end;
  bool outer;  // whether the other coordinates are in the old block

  MG_DEVICE Cursor(const YoungBox* young, const Rate* rates, int boxes, int64_t i)
      : young(young), rates(rates), boxes(boxes), start(0), stop(0) {
    int low = 0, high = boxes;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (young[middle].start > i) high = middle; else low = middle + 1;
    }
    box = low > 0 ? low - 2 : -1;  // `next` enters the last that begins here or before
  }

  // Takes a position inside the box apart.
  MG_DEVICE void seek(int64_t i) {
    const uint32_t position = (uint32_t)(i - start);
    uint32_t rest = position / (uint32_t)size;
    at = (int)(position - rest * (uint32_t)size);
    outer = true;
#pragma unroll
    for (int a = kAxes - 2; a >= 0; --a) {
      const uint32_t length = (uint32_t)young[box].size[a], above = a ? rest / length : 0;
      outer = outer && is_old((int)(rest - above * length), (int)young[box].begin[a],
                              (int)young[box].step[a], (int)young[box].count[a]);
      rest = above;
    }
  }

  MG_DEVICE static bool is_old(int at, int begin, int step, int count) {
    const int from = at - begin;
    return from >= 0 && from < step * count && (step == 1 || from % step == 0);
  }

  // The rate of position i; to be asked for in steps of one.
  MG_DEVICE Rate next(int64_t i, Rate usual) {
    if (i >= stop) {
      if (box + 1 >= boxes || i < young[box + 1].start) return usual;
      ++box;
      while (box + 1 < boxes && young[box + 1].start == young[box].start) ++box;
      const YoungBox& b = young[box];
      start = b.start, stop = start + b.volume;
      if (i >= stop) return usual;
      begin = (int)b.begin[kAxes - 1], step = (int)b.step[kAxes - 1];
      end = begin + step * (int)b.count[kAxes - 1];
      at = size = (int)b.size[kAxes - 1];
    }
    if (at == size) seek(i);
    const bool old = outer && at >= begin && at < end && (step == 1 || (at - begin) % step == 0);
    ++at;
    int row = box;
#pragma unroll 1
    while (row >= 0 && (row == box ? old : holds(young[row], (uint32_t)(i - start)))) {
      --row;
      if (row >= 0 && young[row].start != start) row = -1;
    }
    // Number by number: a choice between two records would put them on the stack.
    Rate found = usual;
    if (row >= 0) {
      found.lr = rates[row].lr;
      found.step_size = rates[row].step_size;
      found.root_correction = rates[row].root_correction;
    }
    return found;
  }

  // Whether the old block of a box holds a position.
  MG_DEVICE static bool holds(const YoungBox& b, uint32_t rest) {
    bool old = true;
#pragma unroll 1  // rare; unrolled it keeps the loop over a vector's elements from being so
    for (int a = kAxes - 1; a >= 0; --a) {
      const uint32_t length = (uint32_t)b.size[a], above = rest / length;
      old = old && is_old((int)(rest - above * length), (int)b.begin[a], (int)b.step[a],
                          (int)b.count[a]);
      rest = above;
    }
    return old;
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
MG_KERNEL __launch_bounds__(NT, 4)
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
