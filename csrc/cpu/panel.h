// Products of small row panels with packed matrices, on vectors of kBytes bytes.
//
// Everything is inlined into the caller, which fixes the instruction set. Strides count numbers
// and are multiples of lanes<T, kBytes>; pointers to packed data are aligned to kBytes.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "../common/config.h"

// On lambdas, which inlining alone gives the caller's instruction set.
#define PREPARED_INLINE __attribute__((always_inline))

namespace torch_prepared {

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

template <class T, int kBytes>
constexpr int64_t lanes = kBytes / sizeof(T);

template <class T, int kBytes>
constexpr int64_t padded(int64_t count) {
  return (count + lanes<T, kBytes> - 1) / lanes<T, kBytes> * lanes<T, kBytes>;
}

template <class T, int kBytes>
PREPARED_HD Vector<T, kBytes>& at(T* numbers) {
  return *reinterpret_cast<Vector<T, kBytes>*>(numbers);
}

template <class T, int kBytes>
PREPARED_HD const Vector<T, kBytes>& at(const T* numbers) {
  return *reinterpret_cast<const Vector<T, kBytes>*>(numbers);
}

template <class T, int kBytes>
PREPARED_HD T sum_lanes(const Vector<T, kBytes>& vector) {
  if constexpr (kBytes <= 16) {
    T sum = vector[0];
    for (int64_t i = 1; i < lanes<T, kBytes>; ++i) sum += vector[i];
    return sum;
  } else {
    Vector<T, kBytes / 2> halves[2];
    __builtin_memcpy(halves, &vector, kBytes);
    return sum_lanes<T, kBytes / 2>(halves[0] + halves[1]);
  }
}

// A row-major matrix; columns beyond the last, up to the stride, are zero or hold no meaning.
template <class T>
struct Panel {
  T* data;
  int64_t stride;

  PREPARED_HD T* row(int64_t r) const { return data + r * stride; }
};

// out[0:kRows, 0:kVectors] = left[0:kRows, 0:terms] @ right[0:terms, 0:kVectors].
template <class T, int kBytes, int kRows, int kVectors>
PREPARED_HD void multiply_tile(Panel<T> left, Panel<T> right, int64_t terms, Panel<T> out) {
  using V = Vector<T, kBytes>;
  V sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < terms; ++k) {
    V factors[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      factors[v] = at<T, kBytes>(right.row(k) + v * lanes<T, kBytes>);
    }
    for (int r = 0; r < kRows; ++r) {
      const T scale = left.row(r)[k];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += scale * factors[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      at<T, kBytes>(out.row(r) + v * lanes<T, kBytes>) = sums[r][v];
    }
  }
}

template <class T, int kBytes, int kVectors>
PREPARED_HD void multiply_columns(Panel<T> left, Panel<T> right, int64_t rows, int64_t terms,
                                  Panel<T> out) {
  int64_t r = 0;
  const auto tile = [&](auto size) PREPARED_INLINE {
    constexpr int kRows = decltype(size)::value;
    for (; r + kRows <= rows; r += kRows) {
      multiply_tile<T, kBytes, kRows, kVectors>({left.row(r), left.stride}, right, terms,
                                                {out.row(r), out.stride});
    }
  };
  if constexpr (kBytes == 64) tile(std::integral_constant<int, 8>());  // 32 registers
  tile(std::integral_constant<int, 4>());
  tile(std::integral_constant<int, 2>());
  tile(std::integral_constant<int, 1>());
}

// out (rows, stride) = left (rows, terms) @ right (terms, stride); both strides are equal.
template <class T, int kBytes>
PREPARED_HD void multiply(Panel<T> left, Panel<T> right, int64_t rows, int64_t terms,
                          Panel<T> out) {
  const int64_t vectors = right.stride / lanes<T, kBytes>;
  int64_t v = 0;
  const auto columns = [&](auto size) PREPARED_INLINE {
    constexpr int kVectors = decltype(size)::value;
    const int64_t shift = v * lanes<T, kBytes>;
    multiply_columns<T, kBytes, kVectors>(left, {right.data + shift, right.stride}, rows, terms,
                                          {out.data + shift, out.stride});
    v += kVectors;
  };
  while (vectors - v > 4 || vectors - v == 3) columns(std::integral_constant<int, 3>());
  while (vectors - v >= 2) columns(std::integral_constant<int, 2>());
  if (v < vectors) columns(std::integral_constant<int, 1>());
}

}  // namespace torch_prepared
