// Rows that share coefficients, read together in whole vectors.
//
// Each row's sum is built in the same order however many rows go together, so a result does not
// depend on a row's neighbors.
#pragma once

#include <algorithm>

#include "../common/row_groups.h"
#include "panel.h"

namespace torch_prepared {

constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int64_t kNearBytes = 16 << 10;  // of coefficients that stay in the first cache level
constexpr int kTogether = 4;              // rows that use a coefficient once it is in a register

template <class T, int kBytes>
PREPARED_HD Vector<T, kBytes> load(const T* from) {
  Vector<T, kBytes> vector;
  __builtin_memcpy(&vector, from, kBytes);
  return vector;
}

template <class T, int kBytes>
PREPARED_HD void store(T* to, const Vector<T, kBytes>& vector) {
  __builtin_memcpy(to, &vector, kBytes);
}

// Zero in the first `count` lanes, which an overlapping vector has handled already.
template <class T, int kBytes>
PREPARED_HD Vector<T, kBytes> drop_first(const Vector<T, kBytes>& vector, int64_t count) {
  using Number = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Vector<Number, kBytes> lane;
  for (int64_t i = 0; i < lanes<T, kBytes>; ++i) lane[i] = static_cast<Number>(i);
  return lane < static_cast<Number>(count) ? Vector<T, kBytes>{} : vector;
}

// Calls f(first column, overlaps) for vectors that cover n >= lanes columns; where n is no multiple
// of the lanes, the last one overlaps its neighbor.
template <class T, int kBytes, class F>
PREPARED_HD void over_columns(int64_t n, const F& f) {
  constexpr int64_t kLanes = lanes<T, kBytes>;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) f(j, std::false_type());
  if (j < n) f(n - kLanes, std::true_type());
}

// Calls f(rows, first member, group) on blocks of rows begin .. end - 1 of a layout, `rows` a
// constant. Rows of whole cache lines go one by one while their coefficients stay near: neighbors
// a power of two apart would evict each other.
template <class T, class F>
PREPARED_HD void over_blocks(const RowGroups& layout, int64_t begin, int64_t end,
                             int64_t coefficients, const F& f) {
  const int64_t bytes = layout.size * static_cast<int64_t>(sizeof(T));
  const bool single = bytes % kLine == 0 && coefficients * bytes <= kNearBytes;
  for (int64_t i = begin; i < end;) {
    const int64_t group = i / layout.members, member = i % layout.members;
    if (!single && std::min(layout.members - member, end - i) >= kTogether) {
      f(std::integral_constant<int, kTogether>(), member, group);
      i += kTogether;
    } else {
      f(std::integral_constant<int, 1>(), member, group);
      ++i;
    }
  }
}

}  // namespace torch_prepared
