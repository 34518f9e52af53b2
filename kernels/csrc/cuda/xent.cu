// softmax_stats, and the gradient of the cross entropy out of place and in place.
#include "../common/op.h"
#include "../xent.cuh"

namespace mg::xent_op {
constexpr int NT = MG_THREADS(512, 64);

void check_logits(const Tensor& logits, const Tensor& labels) {
  check(logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0),
        "logits are [rows, columns], labels [rows]");
  check_contiguous(logits, "logits");
  check_contiguous(labels, "labels");
  check(labels.scalar_type() == ScalarType::Long, "labels must be int64");
  check(logits.size(1) < (1 << 30), "too many columns");
}

template <class T>
void stats_as(const Tensor& logits, const Tensor& labels, int64_t start, const Tensor& stats) {
  const Place place(logits);
  const T* x = data<T>(logits);
  const int64_t *l = data<int64_t>(labels), rows = logits.size(0);
  acc_t<T>* s = out<acc_t<T>>(stats);
  const int n = (int)logits.size(1);
  MG_LAUNCH((softmax_stats<T, NT>), dim3((unsigned)rows), dim3(NT), place.stream, x, l, start, s,
            rows, n);
}

Tensor stats_op(Tensor logits, Tensor labels, int64_t start) {
  check_logits(logits, labels);
  Tensor stats = empty(logits, {3, logits.size(0)}, accumulator_of(logits));
  if (logits.size(0))
    dispatch(logits.scalar_type(),
             [&](auto t) { stats_as<decltype(t)>(logits, labels, start, stats); });
  return stats;
}

template <class T>
void gradient_as(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                 const Tensor& stats, int64_t start, const Tensor& into) {
  const Place place(logits);
  const acc_t<T>*g = data<acc_t<T>>(grad), *s = data<acc_t<T>>(stats);
  const T* x = data<T>(logits);
  T* o = out<T>(into);
  const int64_t *l = data<int64_t>(labels), rows = logits.size(0);
  const int n = (int)logits.size(1);
  MG_LAUNCH_FLAT((softmax_gradient<T, NT>), dim3((unsigned)rows), dim3(NT), place.stream, g, x, l,
                 s, start, o, rows, n);
}

void gradient_into(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                   const Tensor& stats, int64_t start, const Tensor& into) {
  check_logits(logits, labels);
  check_contiguous(grad, "the losses' gradient");
  check_contiguous(stats, "stats");
  check(grad.numel() == labels.numel() && grad.scalar_type() == accumulator_of(logits),
        "the losses' gradient is [rows], in the type of the statistics");
  check(stats.numel() == 3 * labels.numel() && stats.scalar_type() == accumulator_of(logits),
        "stats are [3, rows]");
  if (logits.numel() == 0) return;
  dispatch(logits.scalar_type(),
           [&](auto t) { gradient_as<decltype(t)>(grad, logits, labels, stats, start, into); });
}

Tensor gradient(Tensor grad, Tensor logits, Tensor labels, Tensor stats, int64_t start) {
  check_logits(logits, labels);
  Tensor result = torch::stable::empty_like(logits);
  gradient_into(grad, logits, labels, stats, start, result);
  return result;
}

void gradient_(Tensor grad, Tensor logits, Tensor labels, Tensor stats, int64_t start) {
  gradient_into(grad, logits, labels, stats, start, logits);
}
}  // namespace mg::xent_op

STABLE_TORCH_LIBRARY_IMPL(MG_NAMESPACE, MG_KEY, m) {
  m.impl("softmax_stats", TORCH_BOX(&mg::xent_op::stats_op));
  m.impl("cross_entropy_backward", TORCH_BOX(&mg::xent_op::gradient));
  m.impl("cross_entropy_backward_", TORCH_BOX(&mg::xent_op::gradient_));
}
