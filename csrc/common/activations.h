// Facts about smooth activations, shared by CPU and CUDA. A struct per activation states
//   value(x), derivative(x)  with a bound on the absolute error of the computed number,
//   second(x)                second derivative (used for gradients only),
//   jet(x)                   all three without errors, quickly (used for root finding only),
//   slope_min(), slope_max() a range that contains every derivative,
//   kKinked                  whether the derivative jumps somewhere; then value(x) must have a
//                            small relative error near the jump,
//   valley()                 a lower bound of sigma's local minima (+inf when it is monotone),
//   core(upper, l, u)        the interval on which the bounded side is concave: sigma itself for
//                            upper lines, -sigma for lower lines; outside of it that function is
//                            convex as far as [l, u] reaches (exception: see Silu::core).
// The error bounds cover glibc's and CUDA's documented errors (at most 4 ulp for each function
// used here, 5 ulp for erfc) plus the roundings of the formula.
#pragma once

#include "rounding.h"

namespace torch_prepared {

struct Evaluated {
  double value;
  double error;
};

struct Jet {
  double value, slope, second;
};

struct Core {
  double begin;
  double end;
};

PREPARED_HD Core everywhere() { return {-kInf, kInf}; }
PREPARED_HD Core nowhere() { return {kInf, -kInf}; }
PREPARED_HD Core s_shaped(bool upper) { return upper ? Core{0.0, kInf} : Core{-kInf, 0.0}; }

PREPARED_HD Evaluated within_ulps(double value, double ulps) {
  return {value, ulps * kEps * fabs(value) + kTiny};
}

// exp(-|x|) / (1 + exp(-|x|))^2, the derivative of the logistic function, without cancellation.
PREPARED_HD double logistic_slope(double x) {
  const double e = exp(-fabs(x));
  return e / ((1.0 + e) * (1.0 + e));
}

// What jet() is where nothing can be shared.
template <class Activation>
PREPARED_HD Jet evaluate_apart(const Activation& f, double x) {
  return {f.value(x).value, f.derivative(x).value, f.second(x)};
}

// The jet of the logistic function: one exponential, no overflow.
PREPARED_HD Jet logistic_jet(double x) {
  const double e = exp(-fabs(x)), part = 1.0 / (1.0 + e), slope = e * part * part;
  return {x >= 0.0 ? part : e * part, slope, slope * (x >= 0.0 ? e - 1.0 : 1.0 - e) * part};
}

struct Sigmoid {
  static constexpr bool kKinked = false;
  PREPARED_HD explicit Sigmoid(double) {}
  PREPARED_HD Evaluated value(double x) const { return within_ulps(1.0 / (1.0 + exp(-x)), 8.0); }
  PREPARED_HD Evaluated derivative(double x) const { return within_ulps(logistic_slope(x), 16.0); }
  PREPARED_HD double second(double x) const {
    return logistic_slope(x) * (1.0 - 2.0 / (1.0 + exp(-x)));
  }
  PREPARED_HD Jet jet(double x) const { return logistic_jet(x); }
  PREPARED_HD double valley() const { return kInf; }
  PREPARED_HD double slope_min() const { return 0.0; }
  PREPARED_HD double slope_max() const { return 0.25; }
  PREPARED_HD Core core(bool upper, double, double) const { return s_shaped(upper); }
};

struct Tanh {
  static constexpr bool kKinked = false;
  PREPARED_HD explicit Tanh(double) {}
  PREPARED_HD Evaluated value(double x) const { return within_ulps(tanh(x), 8.0); }
  PREPARED_HD Evaluated derivative(double x) const {
    return within_ulps(4.0 * logistic_slope(2.0 * x), 16.0);
  }
  PREPARED_HD double second(double x) const { return -8.0 * tanh(x) * logistic_slope(2.0 * x); }
  PREPARED_HD Jet jet(double x) const {
    const double m = expm1(-2.0 * fabs(x)), part = 1.0 / (2.0 + m);
    const double value = copysign(-m * part, x), slope = 4.0 * (1.0 + m) * part * part;
    return {value, slope, -2.0 * value * slope};
  }
  PREPARED_HD double valley() const { return kInf; }
  PREPARED_HD double slope_min() const { return 0.0; }
  PREPARED_HD double slope_max() const { return 1.0; }
  PREPARED_HD Core core(bool upper, double, double) const { return s_shaped(upper); }
};

struct Softplus {
  static constexpr bool kKinked = false;
  PREPARED_HD explicit Softplus(double) {}
  PREPARED_HD Evaluated value(double x) const {
    return within_ulps(fmax(x, 0.0) + log1p(exp(-fabs(x))), 8.0);
  }
  PREPARED_HD Evaluated derivative(double x) const {
    return within_ulps(1.0 / (1.0 + exp(-x)), 8.0);
  }
  PREPARED_HD double second(double x) const { return logistic_slope(x); }
  PREPARED_HD Jet jet(double x) const { return evaluate_apart(*this, x); }
  PREPARED_HD double valley() const { return kInf; }
  PREPARED_HD double slope_min() const { return 0.0; }
  PREPARED_HD double slope_max() const { return 1.0; }
  PREPARED_HD Core core(bool upper, double, double) const {
    return upper ? nowhere() : everywhere();
  }
};

// x for x > 0, alpha (exp(x) - 1) otherwise, alpha >= 0. Convex when alpha <= 1; otherwise the
// slope drops from alpha to 1 at zero, which makes it S-shaped. derivative(0) is alpha: a valid
// supergradient of the concave side in either case.
struct Elu {
  static constexpr bool kKinked = true;
  double alpha;
  PREPARED_HD explicit Elu(double parameter) : alpha(parameter) {}
  PREPARED_HD Evaluated value(double x) const {
    return x > 0.0 ? Evaluated{x, 0.0} : within_ulps(alpha * expm1(x), 8.0);
  }
  PREPARED_HD Evaluated derivative(double x) const {
    return x > 0.0 ? Evaluated{1.0, 0.0} : within_ulps(alpha * exp(x), 8.0);
  }
  PREPARED_HD double second(double x) const { return x > 0.0 ? 0.0 : alpha * exp(x); }
  PREPARED_HD Jet jet(double x) const { return evaluate_apart(*this, x); }
  PREPARED_HD double valley() const { return kInf; }
  PREPARED_HD double slope_min() const { return 0.0; }
  PREPARED_HD double slope_max() const { return fmax(1.0, alpha); }
  PREPARED_HD Core core(bool upper, double, double) const {
    if (alpha > 1.0) return s_shaped(upper);
    return upper ? nowhere() : everywhere();
  }
};

// Concave, convex, concave with inflections at -c and c, decreasing on the left tail. For upper
// lines the core is the right tail when [l, u] reaches it, else the left one. When [l, u] holds
// both tails, sigma - s x with s >= 0 decreases on the left tail, so its maximum there is at l,
// which is verified anyway; the slopes chosen are those of a chord or tangent ending on the
// right tail, hence positive.
PREPARED_HD Core two_tailed(bool upper, double inflection, double u) {
  if (!upper) return {-inflection, inflection};
  return u > inflection ? Core{inflection, kInf} : Core{-kInf, -inflection};
}

// x / (1 + exp(-x)); the inflection solves x tanh(x / 2) = 2.
struct Silu {
  static constexpr bool kKinked = false;
  PREPARED_HD explicit Silu(double) {}
  PREPARED_HD Evaluated value(double x) const {
    return x < -800.0 ? Evaluated{0.0, kTiny} : within_ulps(x / (1.0 + exp(-x)), 8.0);
  }
  PREPARED_HD Evaluated derivative(double x) const {
    const double s = 1.0 / (1.0 + exp(-x));
    const double bend = x * logistic_slope(x);
    return {s + bend, 24.0 * kEps * (s + fabs(bend)) + kTiny};
  }
  PREPARED_HD double second(double x) const {
    const double s = 1.0 / (1.0 + exp(-x));
    return logistic_slope(x) * (2.0 + x * (1.0 - 2.0 * s));
  }
  PREPARED_HD Jet jet(double x) const {
    const Jet s = logistic_jet(x);
    return {x * s.value, s.value + x * s.slope, 2.0 * s.slope + x * s.second};
  }
  PREPARED_HD double valley() const { return -0.27847; }
  PREPARED_HD double slope_min() const { return -0.125; }
  PREPARED_HD double slope_max() const { return 1.125; }
  PREPARED_HD Core core(bool upper, double, double u) const {
    return two_tailed(upper, 2.3993572805154675, u);
  }
};

// x Phi(x) = x erfc(-x / sqrt 2) / 2; inflections at -sqrt 2 and sqrt 2. On the left tail the
// rounding of x / sqrt 2 is amplified by x^2, which the error bounds contain.
struct Gelu {
  static constexpr bool kKinked = false;
  PREPARED_HD explicit Gelu(double) {}
  PREPARED_HD static double cumulative(double x) { return 0.5 * erfc(-x * 0.7071067811865476); }
  PREPARED_HD static double density(double x) { return 0.3989422804014327 * exp(-0.5 * x * x); }
  PREPARED_HD static double ulps(double x) { return x < 0.0 ? 16.0 + 2.0 * x * x : 16.0; }
  PREPARED_HD Evaluated value(double x) const {
    return x < -40.0 ? Evaluated{0.0, kTiny} : within_ulps(x * cumulative(x), ulps(x));
  }
  PREPARED_HD Evaluated derivative(double x) const {
    const double phi = cumulative(x);
    const double bend = fabs(x) > 40.0 ? 0.0 : x * density(x);
    return {phi + bend, kEps * (phi * ulps(x) + fabs(bend) * (16.0 + x * x)) + kTiny};
  }
  PREPARED_HD double second(double x) const {
    return fabs(x) > 40.0 ? 0.0 : density(x) * (2.0 - x * x);
  }
  PREPARED_HD Jet jet(double x) const {
    const double phi = cumulative(x), bell = fabs(x) > 40.0 ? 0.0 : density(x);
    return {x * phi, phi + x * bell, bell * (2.0 - x * x)};
  }
  PREPARED_HD double valley() const { return -0.17; }
  PREPARED_HD double slope_min() const { return -0.1875; }
  PREPARED_HD double slope_max() const { return 1.1875; }
  PREPARED_HD Core core(bool upper, double, double u) const {
    return two_tailed(upper, 1.4142135623730951, u);
  }
};

// x / (1 + exp(-q)) with q = 2 sqrt(2 / pi) (x + 0.044715 x^3): PyTorch's approximate="tanh". On
// the left tail the rounding of q is amplified by q, which the error bounds contain; a test proves
// in interval arithmetic that the second derivative changes its sign at the inflections only.
struct GeluTanh {
  static constexpr bool kKinked = false;
  static constexpr double kScale = 1.5957691216057308, kCube = 0.044715;
  PREPARED_HD explicit GeluTanh(double) {}
  PREPARED_HD static double inner(double x) { return kScale * (x + kCube * x * x * x); }
  PREPARED_HD static double inner_slope(double x) { return kScale * (1.0 + 3.0 * kCube * x * x); }
  PREPARED_HD static double ulps(double x) { return x < 0.0 ? 16.0 + 8.0 * fabs(inner(x)) : 16.0; }
  PREPARED_HD static bool far(double x) { return fabs(x) > 22.0; }  // q > 794: nothing but x or 0
  PREPARED_HD static double logistic(double x) { return 1.0 / (1.0 + exp(-inner(x))); }
  PREPARED_HD Evaluated value(double x) const {
    if (far(x)) return {fmax(x, 0.0), 64.0 * kTiny};
    const double y = x * logistic(x);
    return {y, ulps(x) * kEps * fabs(y) + 64.0 * kTiny};
  }
  PREPARED_HD Evaluated derivative(double x) const {
    if (far(x)) return {x > 0.0 ? 1.0 : 0.0, 1e4 * kTiny};
    const double s = logistic(x), q = inner(x);
    const double bend = x * logistic_slope(q) * inner_slope(x);
    return {s + bend, kEps * (s * ulps(x) + fabs(bend) * (32.0 + 8.0 * fabs(q))) + 1e4 * kTiny};
  }
  PREPARED_HD double second(double x) const {
    if (far(x)) return 0.0;
    const double s = logistic(x), rise = inner_slope(x);
    const double turn = 6.0 * kScale * kCube * x;
    return logistic_slope(inner(x)) * (2.0 * rise + x * ((1.0 - 2.0 * s) * rise * rise + turn));
  }
  PREPARED_HD Jet jet(double x) const {
    if (far(x)) return {fmax(x, 0.0), x > 0.0 ? 1.0 : 0.0, 0.0};
    const Jet s = logistic_jet(inner(x));
    const double rise = inner_slope(x), turn = 6.0 * kScale * kCube * x;
    const double bend = s.second * rise * rise + s.slope * turn;
    return {x * s.value, s.value + x * s.slope * rise, 2.0 * s.slope * rise + x * bend};
  }
  PREPARED_HD double valley() const { return -0.1701; }
  PREPARED_HD double slope_min() const { return -0.1875; }
  PREPARED_HD double slope_max() const { return 1.1875; }
  PREPARED_HD Core core(bool upper, double, double u) const {
    return two_tailed(upper, 1.4185040087908283, u);
  }
};

}  // namespace torch_prepared
