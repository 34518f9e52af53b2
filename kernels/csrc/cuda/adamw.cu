// adamw_: one update of a flat partition, in place.
#include "../adamw.cuh"
#include "../common/op.h"

namespace mg::adamw_op {
Rate rate_of(double lr, double beta1, double beta2, int64_t step) {
  return {(float)lr, (float)(lr / (1.0 - std::pow(beta1, (double)step))),
          (float)std::sqrt(1.0 - std::pow(beta2, (double)step))};
}

template <class G, class L>
void launch(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v,
            const OptionalTensor& low, const OptionalTensor& scale, const OptionalTensor& young,
            const OptionalTensor& rates, const AdamW& options) {
  constexpr int V = 4, NT = MG_THREADS(256, 32);
  const Place place(p);
  const int64_t n = p.numel();
  float *pp = out<float>(p), *pm = out<float>(m), *pv = out<float>(v);
  const G* pg = data<G>(g);
  L* pl = out<L>(low);
  const float* ps = data<float>(scale);
  const YoungBox* py = data<YoungBox>(young);
  const Rate* pr = data<Rate>(rates);
  const int boxes = young ? (int)young->size(0) : 0;
  const int64_t wanted = (n + (int64_t)NT * V - 1) / ((int64_t)NT * V);
  const dim3 grid(at_most(wanted, MG_THREADS(16 * place.processors, 3)));
  // A view may begin anywhere: it is stepped in vectors of 1 element.
  if (!aligned(pp, pg, pm, pv, pl))
    MG_LAUNCH_FLAT((adamw<G, L, 1, NT, true>), grid, dim3(NT), place.stream, pp, pg, pm, pv, pl, ps,
                   py, pr, boxes, n, options);
  else if (boxes > 0)
    MG_LAUNCH_FLAT((adamw<G, L, V, NT, true>), grid, dim3(NT), place.stream, pp, pg, pm, pv, pl, ps,
                   py, pr, boxes, n, options);
  else
    MG_LAUNCH_FLAT((adamw<G, L, V, NT, false>), grid, dim3(NT), place.stream, pp, pg, pm, pv, pl,
                   ps, py, pr, boxes, n, options);
}

void adamw_(Tensor p, Tensor g, Tensor m, Tensor v, OptionalTensor low, OptionalTensor scale,
            OptionalTensor young, OptionalTensor rates, double lr, double beta1, double beta2,
            double eps, double weight_decay, int64_t step) {
  check(p.scalar_type() == ScalarType::Float, "parameter and moments must be fp32");
  check_contiguous(p, "parameter");
  check_like(m, p, "exp_avg");
  check_like(v, p, "exp_avg_sq");
  check_contiguous(g, "gradient");
  check(g.numel() == p.numel(), "the gradient must have the parameter's number of elements");
  if (low) {
    check_contiguous(*low, "the low-precision copy");
    check(low->numel() == p.numel(), "the copy must have the parameter's number of elements");
  }
  if (scale)
    check(scale->numel() == 1 && scale->scalar_type() == ScalarType::Float,
          "scale must be one fp32 number");
  check(step > 0, "step counts from 1");
  check(young.has_value() == rates.has_value(), "young boxes and their rates come together");
  if (young) {
    check_contiguous(*young, "young");
    check_contiguous(*rates, "rates");
    check(young->dim() == 2 && young->size(1) == kYoungColumns &&
              young->scalar_type() == ScalarType::Long && rates->dim() == 2 &&
              rates->size(1) == 3 && rates->size(0) == young->size(0) &&
              rates->scalar_type() == ScalarType::Float,
          "the tables of young boxes are int64 [boxes, 18] and fp32 [boxes, 3]");
  }
  if (p.numel() == 0) return;
  const AdamW options{(float)beta1, (float)beta2, (float)eps, (float)weight_decay,
                      rate_of(lr, beta1, beta2, step)};
  dispatch(g.scalar_type(), [&](auto t) {
    using G = decltype(t);
    if constexpr (std::is_same_v<G, double>) {
      check(false, "the gradient must be fp32, bf16 or fp16");
    } else {
      const ScalarType copy = low ? low->scalar_type() : ScalarType::BFloat16;
      if (copy == ScalarType::BFloat16)
        launch<G, BFloat16>(p, g, m, v, low, scale, young, rates, options);
      else if (copy == ScalarType::Half)
        launch<G, Half>(p, g, m, v, low, scale, young, rates, options);
      else
        check(false, "the low-precision copy must be bf16 or fp16");
    }
  });
}
}  // namespace mg::adamw_op

STABLE_TORCH_LIBRARY_IMPL(MG_NAMESPACE, MG_KEY, m) { m.impl("adamw_", TORCH_BOX(&mg::adamw_op::adamw_)); }
