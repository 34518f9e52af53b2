// Vectors of 16 bytes, the widest access of one thread.
#pragma once
#include "dual.h"

namespace mg {
template <class T, int V> struct alignas(sizeof(T) * V) Vec { T v[V]; };

// Elements of a 16-byte vector.
template <class T> inline constexpr int kWide = 16 / sizeof(T);

template <int V, class T> MG_DEVICE Vec<T, V> load(const T* row, int64_t i) {
  return reinterpret_cast<const Vec<T, V>*>(row)[i];
}
template <int V, class T> MG_DEVICE void store(T* row, int64_t i, const Vec<T, V>& x) {
  reinterpret_cast<Vec<T, V>*>(row)[i] = x;
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
template <class... P> bool aligned(const void* first, P... rest) {
  return aligned(first) && aligned(rest...);
}
}  // namespace mg
