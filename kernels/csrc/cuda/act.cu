// swiglu and bias_gelu, and their backward passes.
#include "../act.cuh"
#include "../common/op.h"

namespace mg::act_op {
constexpr int NT = MG_THREADS(128, 32);

// Columns on x, rows on y: enough blocks to fill the device, each with several rows.
dim3 grid_of(int64_t rows, int vectors, const Place& place, int waves) {
  const int64_t across = (vectors + NT - 1) / NT;
  const int64_t wanted = MG_EMULATED ? 4 : waves * (int64_t)place.processors;
  return dim3((unsigned)across,
              at_most(std::min(rows, (wanted + across - 1) / across), 65535));
}

#define MG_BY_WIDTH(wide, kernel, ...)                                                         \
  if (wide)                                                                                    \
    MG_LAUNCH_FLAT((kernel<T, kWide<T>, NT>), grid_of(rows, n / kWide<T>, place, waves),       \
                   dim3(NT), place.stream, __VA_ARGS__);                                       \
  else                                                                                         \
    MG_LAUNCH_FLAT((kernel<T, 1, NT>), grid_of(rows, n, place, waves), dim3(NT), place.stream, \
                   __VA_ARGS__)

template <class T> void swiglu_as(const Tensor& x, const Tensor& y) {
  const Place place(x);
  const T* px = data<T>(x);
  T* py = out<T>(y);
  const int n = (int)(last(x) / 2), waves = 32;
  const int64_t rows = y.numel() / n;
  const bool wide = n % kWide<T> == 0 && aligned(px, py);
  MG_BY_WIDTH(wide, swiglu_forward, px, py, rows, n);
}

template <class T> void swiglu_backward_as(const Tensor& grad, const Tensor& x, const Tensor& dx) {
  const Place place(x);
  const T *pg = data<T>(grad), *px = data<T>(x);
  T* pd = out<T>(dx);
  const int n = (int)(last(x) / 2), waves = 32;
  const int64_t rows = grad.numel() / n;
  const bool wide = n % kWide<T> == 0 && aligned(pg, px, pd);
  MG_BY_WIDTH(wide, swiglu_backward, pg, px, pd, rows, n);
}

template <class T> void bias_gelu_as(const Tensor& x, const Tensor& bias, const Tensor& y) {
  const Place place(x);
  const T *px = data<T>(x), *pb = data<T>(bias);
  T* py = out<T>(y);
  const int n = (int)last(x), waves = 32;
  const int64_t rows = x.numel() / n;
  const bool wide = n % kWide<T> == 0 && aligned(px, pb, py);
  MG_BY_WIDTH(wide, bias_gelu_forward, px, pb, py, rows, n);
}

template <class T>
void bias_gelu_backward_as(const Tensor& grad, const Tensor& x, const Tensor& bias,
                           const Tensor& dx, const Tensor& db) {
  const Place place(x);
  const T *pg = data<T>(grad), *px = data<T>(x), *pb = data<T>(bias);
  T* pd = out<T>(dx);
  const int n = (int)last(x);
  const int64_t rows = x.numel() / n;
  const auto run = [&](auto v) {
    constexpr int V = decltype(v)::value;
    const auto kernel = bias_gelu_backward<T, V, NT>;
    // As many blocks as run at a time: each leaves a row of partial sums.
    const int64_t across = (n / V + NT - 1) / NT;
    const dim3 grid((unsigned)across,
                    at_most(std::min<int64_t>(rows, resident_blocks(kernel, NT, place) / across), 65535));
    const Tensor part = empty(x, {grid.y, n}, accumulator_of(x));
    acc_t<T>* pp = out<acc_t<T>>(part);
    MG_LAUNCH_FLAT(kernel, grid, dim3(NT), place.stream, pg, px, pb, pd, pp, rows, n);
    launch_sum_rows<T>(pp, out<T>(db), (int)grid.y, n, place.stream);
  };
  if (n % kWide<T> == 0 && aligned(pg, px, pb, pd))
    run(std::integral_constant<int, kWide<T>>{});
  else
    run(std::integral_constant<int, 1>{});
}

void check_halves(const Tensor& x) {
  check_contiguous(x, "the input");
  check(x.dim() > 0 && last(x) % 2 == 0 && last(x) < (1 << 30),
        "swiglu needs a last axis of even length: the gates, then the values");
}
void check_bias(const Tensor& x, const Tensor& bias) {
  check_contiguous(x, "the input");
  check_contiguous(bias, "bias");
  check(bias.scalar_type() == x.scalar_type() && x.dim() > 0 && bias.numel() == last(x) &&
            last(x) < (1 << 30),
        "a bias must have the input's type and the length of its last axis");
}

Tensor swiglu(Tensor x) {
  check_halves(x);
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.back() /= 2;
  Tensor y = empty(x, sizes, x.scalar_type());
  if (y.numel()) dispatch(x.scalar_type(), [&](auto t) { swiglu_as<decltype(t)>(x, y); });
  return y;
}

Tensor swiglu_backward_op(Tensor grad, Tensor x) {
  check_halves(x);
  check_contiguous(grad, "the output's gradient");
  check(grad.scalar_type() == x.scalar_type() && 2 * grad.numel() == x.numel(),
        "the output's gradient must have the output's type and shape");
  Tensor dx = torch::stable::empty_like(x);
  if (x.numel())
    dispatch(x.scalar_type(), [&](auto t) { swiglu_backward_as<decltype(t)>(grad, x, dx); });
  return dx;
}

Tensor bias_gelu(Tensor x, Tensor bias) {
  check_bias(x, bias);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel()) dispatch(x.scalar_type(), [&](auto t) { bias_gelu_as<decltype(t)>(x, bias, y); });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward_op(Tensor grad, Tensor x, Tensor bias) {
  check_bias(x, bias);
  check_like(grad, x, "the output's gradient");
  Tensor dx = torch::stable::empty_like(x), db = torch::stable::empty_like(bias);
  if (x.numel())
    dispatch(x.scalar_type(),
             [&](auto t) { bias_gelu_backward_as<decltype(t)>(grad, x, bias, dx, db); });
  else
    torch::stable::zero_(db);
  return {dx, db};
}
}  // namespace mg::act_op

STABLE_TORCH_LIBRARY_IMPL(MG_NAMESPACE, MG_KEY, m) {
  m.impl("swiglu", TORCH_BOX(&mg::act_op::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&mg::act_op::swiglu_backward_op));
  m.impl("bias_gelu", TORCH_BOX(&mg::act_op::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&mg::act_op::bias_gelu_backward_op));
}
