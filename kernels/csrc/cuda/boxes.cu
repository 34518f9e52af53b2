// copy_boxes_: targets[k] = sources[k] * scales[k], and low[k] the same in low precision.
#include <cstring>
#include "../boxes.cuh"
#include "../common/op.h"

namespace mg::boxes_op {

// Drops axes of length 1 and joins those that lie end to end in both tensors.
Box box_of(const Tensor& target, const Tensor& source, const Tensor* low, double scale) {
  check(target.dim() == source.dim() && (!low || low->dim() == target.dim()),
        "a box must have its source's shape");
  int64_t size[16], to[16], from[16];
  int axes = 0;
  check(target.dim() <= 16, "too many axes");
  for (int64_t d = 0; d < target.dim(); ++d) {
    const int64_t n = target.size(d);
    check(n == source.size(d) && (!low || n == low->size(d)), "a box must have its source's shape");
    check(n < (int64_t(1) << 31), "an axis is too long");
    check(!low || n == 1 || low->stride(d) == target.stride(d),
          "a low-precision copy must have its target's strides");
    if (n == 1) continue;
    if (axes && to[axes - 1] == target.stride(d) * n && from[axes - 1] == source.stride(d) * n &&
        size[axes - 1] * n < (int64_t(1) << 31)) {
      size[axes - 1] *= n;
    } else {
      size[axes++] = n;
    }
    to[axes - 1] = target.stride(d), from[axes - 1] = source.stride(d);
  }
  check(axes <= kBoxAxes, "a box has more than 4 axes that cannot be joined");
  Box box{};
  box.source = source.data_ptr(), box.target = target.data_ptr();
  box.low = low ? low->data_ptr() : nullptr;
  box.scale = scale;
  for (int a = 0; a < kBoxAxes; ++a) {
    const int k = a - (kBoxAxes - axes);
    box.size[a] = k < 0 ? 1 : (uint32_t)size[k];
    box.target_stride[a] = k < 0 ? 0 : to[k];
    box.source_stride[a] = k < 0 ? 0 : from[k];
  }
  return box;
}

template <class T> void widen(Box& box) {
  constexpr int V = kWide<T>;
  bool wide = aligned(box.source, box.target, box.low) && box.size[kBoxAxes - 1] % V == 0 &&
              box.target_stride[kBoxAxes - 1] == 1 && box.source_stride[kBoxAxes - 1] == 1;
  for (int a = 0; a + 1 < kBoxAxes; ++a)
    wide = wide && box.target_stride[a] % V == 0 && box.source_stride[a] % V == 0;
  if (!wide) return;
  box.wide = 1;
  box.size[kBoxAxes - 1] /= V;
  for (int a = 0; a + 1 < kBoxAxes; ++a) box.target_stride[a] /= V, box.source_stride[a] /= V;
}

template <class T, class L>
void launch(const std::vector<Box>& all, const Place& place) {
  constexpr int NT = MG_THREADS(256, 32);
  for (size_t first = 0; first < all.size(); first += kBoxesALaunch) {
    const size_t count = std::min<size_t>(kBoxesALaunch, all.size() - first);
    Boxes boxes{};
    int64_t longest = 0;
    for (size_t k = 0; k < count; ++k) {
      Box& box = boxes.box[k];
      box = all[first + k];
      widen<T>(box);
      longest = std::max(longest, (int64_t)box.size[0] * box.size[1] * box.size[2] * box.size[3]);
    }
    const dim3 grid(at_most((longest + NT - 1) / NT, MG_THREADS(8 * place.processors, 2)),
                    (unsigned)count);
    MG_LAUNCH_FLAT((copy_boxes<T, L, NT>), grid, dim3(NT), place.stream, boxes);
  }
}

void copy_boxes_(std::vector<Tensor> targets, std::vector<Tensor> sources, std::vector<Tensor> low,
                 std::vector<double> scales) {
  check(targets.size() == sources.size() && targets.size() == scales.size() &&
            (low.empty() || low.size() == targets.size()),
        "as many targets as sources and scales");
  if (targets.empty()) return;
  const ScalarType type = targets[0].scalar_type();
  const ScalarType low_type = low.empty() ? ScalarType::BFloat16 : low[0].scalar_type();
  std::vector<Box> all;
  for (size_t k = 0; k < targets.size(); ++k) {
    check(targets[k].scalar_type() == type && sources[k].scalar_type() == type,
          "targets and sources must have one type");
    check(low.empty() || low[k].scalar_type() == low_type, "low copies must have one type");
    if (targets[k].numel() == 0) continue;
    all.push_back(box_of(targets[k], sources[k], low.empty() ? nullptr : &low[k], scales[k]));
  }
  if (all.empty()) return;
  const Place place(targets[0]);
  check(low_type == ScalarType::BFloat16 || low_type == ScalarType::Half,
        "a low-precision copy must be bf16 or fp16");
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    if (low_type == ScalarType::BFloat16)
      launch<T, BFloat16>(all, place);
    else
      launch<T, Half>(all, place);
  });
}
}  // namespace mg::boxes_op

STABLE_TORCH_LIBRARY_IMPL(MG_NAMESPACE, MG_KEY, m) {
  m.impl("copy_boxes_", TORCH_BOX(&mg::boxes_op::copy_boxes_));
}
