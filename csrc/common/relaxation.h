// Linear lower and upper lines of an activation on [l, u]; the same code on CPU and CUDA.
//
// All arithmetic is binary64. A line is found in two steps. First a slope is chosen for
// tightness; nothing about soundness depends on it. It is narrowed to the output type, and then
// the offset is computed for *that* slope s from what must hold:
//     h(x) <= s x + offset on [l, u],   h = sigma (upper line) or -sigma (lower line).
// On convex pieces of h it is enough to look at the end points. On the concave core, for any d
// in it, h(x) - s x <= h(d) - s d + (h'(d) - s)(x - d), which is largest at an end of the core.
// Errors of the evaluation are added, and the sum is narrowed upward.
#pragma once

#include "activations.h"

namespace torch_prepared {

template <class T>
struct LinePair {
  T lower_slope, lower_offset, upper_slope, upper_offset;
};

// `alpha` is the derivative; `inward` is the same, but where alpha is clamped the one into its
// range.
struct BoundsGradient {
  double lower, upper, alpha, inward;
};

// Incoming gradients, one per output of LinePair.
struct LineGradient {
  double lower_slope, lower_offset, upper_slope, upper_offset;
};

// One neuron's bounds and, optionally, its relaxation parameter.
struct Neuron {
  double lower, upper, alpha;
  bool has_alpha;

  PREPARED_HD bool valid() const { return (lower <= upper) & !(has_alpha & (alpha != alpha)); }
};

enum class Touch { kConstant, kChord, kPoint, kThroughLower, kThroughUpper, kAtLower, kAtUpper };

struct Choice {
  double slope, point;
  Touch touch;
};

// An interval and a function's values at its ends.
struct Piece {
  double l, u;
  Evaluated at_l, at_u;
};

// sigma (sign = 1) or -sigma (sign = -1).
template <class Activation>
struct Side {
  static constexpr bool kKinked = Activation::kKinked;
  Activation activation;
  double sign;

  PREPARED_HD Evaluated value(double x) const {
    const Evaluated e = activation.value(x);
    return {sign * e.value, e.error};
  }
  PREPARED_HD Evaluated derivative(double x) const {
    const Evaluated e = activation.derivative(x);
    return {sign * e.value, e.error};
  }
  PREPARED_HD double slope(double x) const { return derivative(x).value; }
  PREPARED_HD Jet jet(double x) const {
    const Jet j = activation.jet(x);
    return {sign * j.value, sign * j.slope, sign * j.second};
  }
  // The same interval with the values of sigma replaced by h's.
  PREPARED_HD Piece turn(const Piece& p) const {
    return {p.l, p.u, {sign * p.at_l.value, p.at_l.error}, {sign * p.at_u.value, p.at_u.error}};
  }
  PREPARED_HD double clamp_slope(double s) const {
    return sign * fmin(fmax(sign * s, activation.slope_min()), activation.slope_max());
  }
  // How far the tangent at d passes above the curve's point (e, at_e).
  PREPARED_HD double gap(double d, double e, double at_e) const {
    const Jet j = jet(d);
    return j.value + j.slope * (e - d) - at_e;
  }
};

// Tangent point between good (gap >= 0 at e) and bad (gap < 0) whose tangent passes through
// (e, h(e)): Newton's method inside a bracket. Only tightness depends on its convergence.
template <class H>
PREPARED_HD double tangent_through(const H& h, double e, double at_e, double good, double bad) {
  const double toward = good > bad ? 1.0 : -1.0;
  for (double step = 1.0; step < fabs(good - bad); step *= 8.0) {
    if (h.gap(bad + toward * step, e, at_e) >= 0.0) {
      good = bad + toward * step;
      break;
    }
  }
  double x = 0.5 * (good + bad);
  for (int i = 0; i < 48; ++i) {
    const Jet j = h.jet(x);
    const double gap = j.value + j.slope * (e - x) - at_e;
    (gap >= 0.0 ? good : bad) = x;
    const double newton = x - gap / (j.second * (e - x));
    const bool inside = (newton - good) * (newton - bad) < 0.0;
    // A Newton step squares the distance; at the root it may be a rounding out of the bracket.
    const bool close = fabs(newton - x) <= 1e-9 * fabs(x);
    x = inside ? newton : (close ? x : 0.5 * (good + bad));
    if (close) break;
  }
  return x;
}

template <class H>
PREPARED_HD Choice chord(const H& h, const Piece& p, double point) {
  const double rise = p.at_u.value - p.at_l.value;
  return {h.clamp_slope(rise / (p.u - p.l)), point, Touch::kChord};
}

// A tight line above h: the tangent at `point` moved into the range of points whose tangent
// passes above both ends, or the chord when that range is empty.
template <class H>
PREPARED_HD Choice choose_line(const H& h, Core core, const Piece& p, double point) {
  const double l = p.l, u = p.u, at_l = p.at_l.value, at_u = p.at_u.value;
  if (l == u) return {h.slope(l), l, Touch::kPoint};
  const double begin = fmax(l, core.begin), end = fmin(u, core.end);
  if (!(begin < end)) return chord(h, p, l);
  double first = begin, last = end;
  Touch at_first = Touch::kAtLower, at_last = Touch::kAtUpper;
  if (core.begin > l) {
    if (h.gap(end, l, at_l) < 0.0) return chord(h, p, end);
    at_first = Touch::kConstant;
    if (h.gap(begin, l, at_l) < 0.0) {
      first = tangent_through(h, l, at_l, end, begin);
      at_first = Touch::kThroughLower;
    }
  }
  if (core.end < u) {
    if (h.gap(begin, u, at_u) < 0.0) return chord(h, p, begin);
    at_last = Touch::kConstant;
    if (h.gap(end, u, at_u) < 0.0) {
      last = tangent_through(h, u, at_u, begin, end);
      at_last = Touch::kThroughUpper;
    }
  }
  Choice choice = {0.0, point, Touch::kPoint};
  if (choice.point > last) choice = {0.0, last, at_last};
  if (choice.point < first) choice = {0.0, first, at_first};
  choice.slope = h.slope(choice.point);
  const bool through_l = choice.touch == Touch::kThroughLower;
  if (h.kKinked && (through_l || choice.touch == Touch::kThroughUpper)) {
    // At a kink many slopes touch; the tightest one passes through the end of the interval.
    const double e = through_l ? l : u;
    const double rise = h.value(choice.point).value - (through_l ? at_l : at_u);
    choice.slope = h.clamp_slope(rise / (choice.point - e));
  }
  return choice;
}

// Least offset of slope s at x, where h is v, with the error of evaluating it added.
PREPARED_HD double offset_at(const Evaluated& v, double s, double x) {
  const double product = s * x;
  return v.value - product + (v.error + 4.0 * kEps * (fabs(v.value) + fabs(product)) + kTiny);
}

// An offset valid for slope s on the whole interval; d lies in the core when the core is met.
template <class H>
PREPARED_HD double valid_offset(const H& h, Core core, const Piece& p, double s, double d) {
  const double offset = fmax(offset_at(p.at_l, s, p.l), offset_at(p.at_u, s, p.u));
  const double begin = fmax(p.l, core.begin), end = fmin(p.u, core.end);
  if (!(begin < end)) return offset;
  const Evaluated slope = h.derivative(d);
  const double excess = slope.value - s;
  const double reach = excess * (excess > 0.0 ? end - d : begin - d);
  const double doubt = (slope.error + 4.0 * kEps * fabs(excess)) * fmax(end - d, d - begin);
  return fmax(offset, offset_at(h.value(d), s, d) + (reach + doubt) * (1.0 + 8.0 * kEps));
}

template <class Activation>
struct SmoothRule {
  Activation activation;

  PREPARED_HD explicit SmoothRule(double parameter) : activation(parameter) {}

  PREPARED_HD static bool bounded(const Neuron& n) { return n.lower >= -kHuge && n.upper <= kHuge; }

  PREPARED_HD static double middle(const Neuron& n) { return 0.5 * n.lower + 0.5 * n.upper; }

  PREPARED_HD Piece piece(const Neuron& n) const {
    return {n.lower, n.upper, activation.value(n.lower), activation.value(n.upper)};
  }

  PREPARED_HD Choice choose(const Neuron& n, const Piece& ends, bool upper) const {
    const Side<Activation> side = {activation, upper ? 1.0 : -1.0};
    const double point = n.has_alpha ? n.alpha : middle(n);
    const Core core = activation.core(upper, n.lower, n.upper);
    return choose_line(side, core, side.turn(ends), point);
  }

  template <class T>
  PREPARED_HD void above(const Neuron& n, const Piece& ends, bool upper, T* slope,
                         T* offset) const {
    const Side<Activation> side = {activation, upper ? 1.0 : -1.0};
    const Choice choice = choose(n, ends, upper);
    const Core core = activation.core(upper, n.lower, n.upper);
    *slope = static_cast<T>(choice.slope);
    *offset = narrow_up<T>(
        valid_offset(side, core, side.turn(ends), static_cast<double>(*slope), choice.point));
  }

  // Horizontal lines for bounds that are infinite or so large that products could overflow.
  PREPARED_HD double extreme(const Neuron& n, double sign) const {
    const Evaluated at_l = activation.value(n.lower), at_u = activation.value(n.upper);
    const double l = sign * at_l.value + (fabs(at_l.value) < kInf ? at_l.error : 0.0);
    const double u = sign * at_u.value + (fabs(at_u.value) < kInf ? at_u.error : 0.0);
    return sign > 0.0 ? fmax(l, u) : fmax(fmax(l, u), -activation.valley());
  }

  template <class T>
  PREPARED_HD LinePair<T> lines(const Neuron& n) const {
    LinePair<T> pair;
    if (!bounded(n)) {
      return {T(0), -narrow_up<T>(extreme(n, -1.0)), T(0), narrow_up<T>(extreme(n, 1.0))};
    }
    const Piece ends = piece(n);
    above(n, ends, true, &pair.upper_slope, &pair.upper_offset);
    above(n, ends, false, &pair.lower_slope, &pair.lower_offset);
    pair.lower_slope = -pair.lower_slope;
    pair.lower_offset = -pair.lower_offset;
    return pair;
  }

  // Adds the derivative of (slope, offset) of one line, contracted with the incoming gradient.
  PREPARED_HD void line_gradient(const Neuron& n, bool upper, double g_slope, double g_offset,
                                 BoundsGradient* total) const {
    const Choice c = choose(n, piece(n), upper);
    const double l = n.lower, u = n.upper, d = c.point;
    const double s = upper ? c.slope : -c.slope;
    const double at_l = activation.derivative(l).value, at_u = activation.derivative(u).value;
    if (c.touch == Touch::kChord) {
      const double ds_dl = (s - at_l) / (u - l), ds_du = (at_u - s) / (u - l);
      total->lower += g_slope * ds_dl + g_offset * (at_l - s - l * ds_dl);
      total->upper += g_slope * ds_du - g_offset * l * ds_du;
      return;
    }
    const double per_slope = g_slope - d * g_offset;  // the offset is sigma(d) - d s
    const double change = per_slope * activation.second(d);
    const bool by_alpha = n.has_alpha && l != u;
    if (by_alpha) total->inward += change;
    if (by_alpha && c.touch == Touch::kPoint) total->alpha += change;
    if (c.touch == Touch::kThroughLower) {
      total->lower += per_slope * (at_l - s) / (l - d);
    } else if (c.touch == Touch::kThroughUpper) {
      total->upper += per_slope * (at_u - s) / (u - d);
    } else if (c.touch == Touch::kAtLower) {
      total->lower += change;
    } else if (c.touch == Touch::kAtUpper) {
      total->upper += change;
    } else if (c.touch == Touch::kPoint && !by_alpha) {
      total->lower += 0.5 * change;
      total->upper += 0.5 * change;
    }
  }

  PREPARED_HD BoundsGradient gradient(const Neuron& n, const LineGradient& g) const {
    BoundsGradient total = {0.0, 0.0, 0.0, 0.0};
    if (!bounded(n)) return total;
    line_gradient(n, true, g.upper_slope, g.upper_offset, &total);
    line_gradient(n, false, g.lower_slope, g.lower_offset, &total);
    return total;
  }
};

// max(x, p x) with 0 <= p <= 1: ReLU is p = 0. Exact: the lines hold without any tolerance.
// Written without branches so that loops over it vectorize.
struct LeakyRule {
  double p;

  PREPARED_HD explicit LeakyRule(double parameter) : p(parameter) {}

  PREPARED_HD double upper_slope(double l, double u) const {
    const double chord = (u - p * l) / (u - l);
    const double limited = lesser(greater(chord, p), 1.0);
    const double above = u == kInf ? 1.0 : limited;
    return l == -kInf ? p : above;
  }

  template <class T>
  PREPARED_HD LinePair<T> lines(const Neuron& n) const {
    const double l = n.lower, u = n.upper;
    const bool active = l >= 0.0, inactive = u <= 0.0;
    const T stable = active ? T(1) : static_cast<T>(p);
    const T upper = static_cast<T>(upper_slope(l, u));
    const double s = static_cast<double>(upper);
    const double at_l = l == -kInf ? 0.0 : add_up(product_up<T>(p, l), product_up<T>(-s, l));
    const double unbounded = s < 1.0 ? kInf : 0.0;
    const double at_u = u == kInf ? unbounded : add_up(u, product_up<T>(-s, u));
    const double usual = u > -kOffTie * l ? 1.0 : p;
    const T lower = static_cast<T>(n.has_alpha ? lesser(greater(n.alpha, p), 1.0) : usual);
    const bool fixed = active | inactive;
    return {fixed ? stable : lower, T(0), fixed ? stable : upper,
            fixed ? T(0) : narrow_up<T>(greater(at_l, at_u))};
  }

  PREPARED_HD BoundsGradient gradient(const Neuron& n, const LineGradient& g) const {
    const double l = n.lower, u = n.upper;
    BoundsGradient total = {0.0, 0.0, 0.0, 0.0};
    if (l >= 0.0 || u <= 0.0 || u - l > kHuge) return total;
    const double s = upper_slope(l, u), width = u - l;
    const double ds_dl = (s - p) / width, ds_du = (1.0 - s) / width;
    total.lower = g.upper_slope * ds_dl + g.upper_offset * (p - s - l * ds_dl);
    total.upper = g.upper_slope * ds_du - g.upper_offset * l * ds_du;
    if (n.has_alpha && n.alpha >= p && n.alpha <= 1.0) total.alpha = g.lower_slope;
    if (n.has_alpha) total.inward = g.lower_slope;
    return total;
  }
};

}  // namespace torch_prepared
