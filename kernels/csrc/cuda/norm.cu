// rms_norm and layer_norm with an optional residual, and their backward passes.
#include "../common/op.h"
#include "../norm.cuh"

namespace mg::norm_op {

// The shape of a launch: rows of n elements by NT threads with CH vectors of V elements each.
template <class T, class F> void by_width(int n, bool wide, F f) {
  constexpr int V = kWide<T>;
  using std::integral_constant;
#define MG_FITS(device, emulated, ch)                                           \
  if (wide && n <= MG_THREADS(device, emulated) * (ch) * V)                     \
    return f(integral_constant<int, V>{},                                       \
             integral_constant<int, MG_THREADS(device, emulated)>{}, integral_constant<int, ch>{});
  MG_FITS(128, 64, 1)
  MG_FITS(256, 64, 1)
  MG_FITS(512, 64, 1)
  MG_FITS(512, 64, 2)
#undef MG_FITS
  f(integral_constant<int, 1>{}, integral_constant<int, MG_THREADS(512, 64)>{},
    integral_constant<int, 0>{});
}

struct Sizes {
  int64_t rows;
  int n;
};
Sizes sizes_of(const Tensor& x, const Tensor& weight) {
  check_contiguous(x, "the input");
  check_contiguous(weight, "weight");
  check(x.dim() > 0 && weight.dim() == 1 && weight.numel() == last(x) && last(x) > 0 &&
            last(x) <= (1 << 30),
        "a norm's weight must have the length of the last axis");
  check(x.numel() / last(x) < (int64_t(1) << 30), "too many rows");
  check(weight.scalar_type() == x.scalar_type(), "weight and input must have one type");
  return {x.numel() / last(x), (int)last(x)};
}

template <bool CENTER, class T>
void forward_as(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                const OptionalTensor& bias, const Tensor& z, const Tensor& y,
                const OptionalTensor& mean, const Tensor& rstd, double eps) {
  using A = acc_t<T>;
  const auto [rows, n] = sizes_of(x, weight);
  if (rows == 0) return;
  const Place place(x);
  const T *px = data<T>(x), *pr = data<T>(residual), *pw = data<T>(weight), *pb = data<T>(bias);
  T *pz = residual ? out<T>(z) : nullptr, *py = out<T>(y);
  A *pm = out<A>(mean), *ps = out<A>(rstd);
  const bool wide = n % kWide<T> == 0 && aligned(px, pr, pw, pb, pz, py);
  const int columns = n;
  const dim3 grid((unsigned)rows);
  by_width<T>(n, wide, [&](auto v, auto nt, auto ch) {
    constexpr int V = decltype(v)::value, NT = decltype(nt)::value, CH = decltype(ch)::value;
    MG_LAUNCH((norm_forward<T, V, NT, CH, CENTER>), grid, dim3(NT), place.stream, px, pr, pw, pb,
              pz, py, pm, ps, columns, A(eps));
  });
}

template <bool CENTER, class T>
void backward_as(const Tensor& dy, const OptionalTensor& dz, const Tensor& z, const Tensor& weight,
                 const OptionalTensor& mean, const Tensor& rstd, const Tensor& dx, const Tensor& dw,
                 const OptionalTensor& db) {
  using A = acc_t<T>;
  const auto [rows, n] = sizes_of(z, weight);
  if (rows == 0) {
    Tensor zero = dw;
    torch::stable::zero_(zero);
    if (db) {
      Tensor more = *db;
      torch::stable::zero_(more);
    }
    return;
  }
  const Place place(z);
  const T *pdy = data<T>(dy), *pdz = data<T>(dz), *pz = data<T>(z), *pw = data<T>(weight);
  const A *pm = data<A>(mean), *ps = data<A>(rstd);
  T* px = out<T>(dx);
  const bool wide = n % kWide<T> == 0 && aligned(pdy, pdz, pz, pw, px);
  const int columns = n;
  const int count = (int)rows;
  by_width<T>(n, wide, [&](auto v, auto nt, auto ch) {
    constexpr int V = decltype(v)::value, NT = decltype(nt)::value, CH = decltype(ch)::value;
    // As many as run at a time, so that none begins when the others are done.
    const auto kernel = [] {
      if constexpr (CH > 0)
        return &norm_backward<T, V, NT, CH, CENTER>;
      else
        return &norm_backward_long<T, NT, CENTER>;
    }();
    const unsigned blocks = at_most(count, resident_blocks(kernel, NT, place));
    const Tensor dw_part = empty(z, {blocks, columns}, accumulator_of(z));
    const OptionalTensor db_part =
        CENTER ? OptionalTensor(empty(z, {blocks, columns}, accumulator_of(z))) : std::nullopt;
    A *pdw = out<A>(dw_part), *pdb = out<A>(db_part);
    MG_LAUNCH(kernel, dim3(blocks), dim3(NT), place.stream, pdy, pdz, pz, pw, pm, ps, px, pdw, pdb,
              count, columns);
    launch_sum_rows<T>(pdw, out<T>(dw), (int)blocks, columns, place.stream);
    if (db) launch_sum_rows<T>(pdb, out<T>(*db), (int)blocks, columns, place.stream);
  });
}

Tensor empty_rows(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  return empty(x, sizes, accumulator_of(x));
}
// What stands for the sum with a residual where there is none.
Tensor sum_like(const Tensor& x, const OptionalTensor& residual) {
  if (!residual) return empty(x, {0}, x.scalar_type());
  check_like(*residual, x, "residual");
  return torch::stable::empty_like(x);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm(Tensor x, OptionalTensor residual, Tensor weight,
                                            double eps) {
  sizes_of(x, weight);
  Tensor y = torch::stable::empty_like(x), z = sum_like(x, residual), rstd = empty_rows(x);
  dispatch(x.scalar_type(), [&](auto t) {
    forward_as<false, decltype(t)>(x, residual, weight, {}, z, y, {}, rstd, eps);
  });
  return {y, z, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, OptionalTensor residual,
                                                      Tensor weight, Tensor bias, double eps) {
  sizes_of(x, weight);
  check_like(bias, weight, "bias");
  Tensor y = torch::stable::empty_like(x), z = sum_like(x, residual);
  Tensor mean = empty_rows(x), rstd = empty_rows(x);
  dispatch(x.scalar_type(), [&](auto t) {
    forward_as<true, decltype(t)>(x, residual, weight, bias, z, y, mean, rstd, eps);
  });
  return {y, z, mean, rstd};
}

void check_gradients(const Tensor& dy, const OptionalTensor& dz, const Tensor& z) {
  check_like(dy, z, "the output's gradient");
  if (dz) check_like(*dz, z, "the sum's gradient");
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, OptionalTensor dz, Tensor z, Tensor weight,
                                             Tensor rstd) {
  check_gradients(dy, dz, z);
  Tensor dx = torch::stable::empty_like(z), dw = torch::stable::empty_like(weight);
  dispatch(z.scalar_type(), [&](auto t) {
    backward_as<false, decltype(t)>(dy, dz, z, weight, {}, rstd, dx, dw, {});
  });
  return {dx, dw};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, OptionalTensor dz, Tensor z,
                                                       Tensor weight, Tensor mean, Tensor rstd) {
  check_gradients(dy, dz, z);
  Tensor dx = torch::stable::empty_like(z), dw = torch::stable::empty_like(weight);
  Tensor db = torch::stable::empty_like(weight);
  dispatch(z.scalar_type(), [&](auto t) {
    backward_as<true, decltype(t)>(dy, dz, z, weight, mean, rstd, dx, dw, db);
  });
  return {dx, dw, db};
}
}  // namespace mg::norm_op

STABLE_TORCH_LIBRARY_IMPL(MG_NAMESPACE, MG_KEY, m) {
  m.impl("rms_norm", TORCH_BOX(&mg::norm_op::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&mg::norm_op::rms_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&mg::norm_op::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&mg::norm_op::layer_norm_backward));
}
