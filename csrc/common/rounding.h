// Directed rounding in binary64 and outward narrowing to binary32, without touching the
// floating-point environment. Device code uses the hardware's rounding modes; host code uses
// error-free transformations (Dekker 1971; Ogita, Rump, Oishi 2005) and one step to the
// neighboring number where the exact result was rounded the wrong way. Needs no -ffast-math.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "config.h"

namespace torch_prepared {

constexpr double kEps = 2.220446049250313e-16;     // 2^-52, distance from 1 to the next number
constexpr double kTiny = 2.2250738585072014e-308;  // smallest normal number
constexpr double kHuge = 1e150;                    // squares of smaller numbers do not overflow
constexpr double kInf = __builtin_huge_val();

// The lower line of max(x, p x) on [l, u] has slope 1 by default where u > -kOffTie * l: where the
// area is the smaller one, but for a little. Symmetric weights make many exact ties u = -l, which
// rounding would decide here one way and in a checker of the bounds another.
constexpr double kOffTie = 1.0 + 1.0 / 65536;

template <class To, class From>
PREPARED_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Unlike fmax and fmin these vectorize; a NaN in the first argument gives the second.
PREPARED_HD double greater(double a, double b) { return a > b ? a : b; }
PREPARED_HD double lesser(double a, double b) { return a < b ? a : b; }

// Smallest number above x; +inf and NaN stay as they are.
PREPARED_HD double next_up(double x) {
  const double shifted = x + 0.0;  // -0 becomes +0
  const int64_t bits = bits_as<int64_t>(shifted);
  const double next = bits_as<double>(bits + (bits >= 0 ? 1 : -1));
  return x < kInf ? next : x;
}

PREPARED_HD float next_up(float x) {
  const float shifted = x + 0.0f;
  const int32_t bits = bits_as<int32_t>(shifted);
  const float next = bits_as<float>(bits + (bits >= 0 ? 1 : -1));
  return x < static_cast<float>(kInf) ? next : x;
}

// a + b rounded up.
PREPARED_HD double add_up(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_ru(a, b);
#else
  const double sum = a + b;
  const double shadow = sum - a;
  const double error = (a - (sum - shadow)) + (b - shadow);
  return error > 0.0 ? next_up(sum) : sum;
#endif
}

// High half of x's significand (Veltkamp); the rest is exact and as short.
PREPARED_HD double high_half(double x) {
  const double shifted = 134217729.0 * x;  // 2^27 + 1
  return shifted - (shifted - x);
}

// a * b rounded up. Moves up as well when the product is too small or a factor too large for its
// error to be computed. Written without fma, which not every instruction set has as a vector.
PREPARED_HD double mul_up(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_ru(a, b);
#else
  const double product = a * b;
  const double a_high = high_half(a), b_high = high_half(b);
  const double a_low = a - a_high, b_low = b - b_high;
  const double error =
      a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low);
  const bool exact = error <= 0.0;  // false for NaN
  const bool vague = (fabs(product) < 1e-290) & (a != 0.0) & (b != 0.0);
  return (!exact | vague) ? next_up(product) : product;
#endif
}

// a * b rounded up, of numbers that T can hold: the product of two binary32 numbers is exact.
template <class T>
PREPARED_HD double product_up(double a, double b) {
  return sizeof(T) == sizeof(float) ? a * b : mul_up(a, b);
}

PREPARED_HD double sub_up(double a, double b) { return add_up(a, -b); }
PREPARED_HD double add_down(double a, double b) { return -add_up(-a, -b); }
PREPARED_HD double mul_down(double a, double b) { return -mul_up(-a, b); }

// Smallest T that is not below x.
template <class T>
PREPARED_HD T narrow_up(double x);

template <>
PREPARED_HD double narrow_up<double>(double x) {
  return x;
}

template <>
PREPARED_HD float narrow_up<float>(double x) {
#ifdef __CUDA_ARCH__
  return __double2float_ru(x);
#else
  const float nearest = static_cast<float>(x);
  return static_cast<double>(nearest) < x ? next_up(nearest) : nearest;
#endif
}

template <class T>
PREPARED_HD T narrow_down(double x) {
  return -narrow_up<T>(-x);
}

}  // namespace torch_prepared
