// rotary and rotary_: query and key heads of a packed projection turned by their positions.
#include "../common/op.h"
#include "../rope.cuh"

namespace mg::rope_op {
void check_packed(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t turned) {
  check_contiguous(x, "the packed heads");
  check_contiguous(cos, "cos");
  check_contiguous(sin, "sin");
  check(x.dim() == 5 && last(x) % 2 == 0, "packed heads are [batch, sequence, groups, heads, width]");
  check(cos.dim() == 2 && cos.size(0) == x.size(1) && 2 * cos.size(1) == last(x) &&
            sin.numel() == cos.numel() && cos.scalar_type() == accumulator_of(x) &&
            sin.scalar_type() == accumulator_of(x),
        "cos and sin are [sequence, width / 2], in fp32 (fp64 for fp64)");
  check(0 <= turned && turned <= x.size(3), "more heads to turn than there are");
  check(x.size(2) * x.size(3) * last(x) < (1 << 30), "too many features");
}

template <class T>
void rotate_as(const Tensor& x, const Tensor& into, const Tensor& cos, const Tensor& sin,
               int64_t turned, bool back) {
  constexpr int NT = MG_THREADS(128, 32);
  const Place place(x);
  const T* px = data<T>(x);
  T* po = out<T>(into);
  const acc_t<T>*pc = data<acc_t<T>>(cos), *ps = data<acc_t<T>>(sin);
  const int sequence = (int)x.size(1), groups = (int)x.size(2), heads = (int)x.size(3);
  const int half = (int)(last(x) / 2), count = (int)turned;
  const dim3 grid((unsigned)(x.size(0) * x.size(1)));
  if (half % kWide<T> == 0 && aligned(px, po, pc, ps))
    MG_LAUNCH_FLAT((rotate<T, kWide<T>, NT>), grid, dim3(NT), place.stream, px, po, pc, ps,
                   sequence, groups, heads, count, half, back);
  else
    MG_LAUNCH_FLAT((rotate<T, 1, NT>), grid, dim3(NT), place.stream, px, po, pc, ps, sequence,
                   groups, heads, count, half, back);
}

void rotate_into(const Tensor& x, const Tensor& into, const Tensor& cos, const Tensor& sin,
                 int64_t turned, bool back) {
  check_packed(x, cos, sin, turned);
  if (x.numel())
    dispatch(x.scalar_type(),
             [&](auto t) { rotate_as<decltype(t)>(x, into, cos, sin, turned, back); });
}

Tensor rotary(Tensor x, Tensor cos, Tensor sin, int64_t turned, bool back) {
  check_packed(x, cos, sin, turned);
  Tensor result = torch::stable::empty_like(x);
  rotate_into(x, result, cos, sin, turned, back);
  return result;
}
void rotary_(Tensor x, Tensor cos, Tensor sin, int64_t turned, bool back) {
  rotate_into(x, x, cos, sin, turned, back);
}
}  // namespace mg::rope_op

STABLE_TORCH_LIBRARY_IMPL(MG_NAMESPACE, MG_KEY, m) {
  m.impl("rotary", TORCH_BOX(&mg::rope_op::rotary));
  m.impl("rotary_", TORCH_BOX(&mg::rope_op::rotary_));
}
