// activation_coefficients and its gradient: arguments, launchers and per-element work.
#pragma once

#include <stdint.h>

#include "../common/context.h"
#include "../common/relaxation.h"

namespace torch_prepared {

enum class Kind { kLeaky, kTanh, kSigmoid, kElu, kSoftplus, kGelu, kGeluTanh, kSilu };

template <class T>
struct CoefficientArgs {
  Kind kind;
  double parameter;
  int64_t count;
  const T* lower;
  const T* upper;
  const T* alpha;   // null when absent
  T* out[4];        // lower_slope, lower_offset, upper_slope, upper_offset
  int64_t* errors;  // one counter
};

template <class T>
struct CoefficientGradArgs {
  Kind kind;
  double parameter;
  int64_t count;
  const T* lower;
  const T* upper;
  const T* alpha;     // null when absent
  const T* grads[4];  // lower_slope, lower_offset, upper_slope, upper_offset
  T* grad_lower;
  T* grad_upper;
  T* grad_alpha;  // (2, count), see BoundsGradient; null when absent
};

#define PREPARED_DECLARE(T, Context)                                       \
  void launch_activation_coefficients(const CoefficientArgs<T>&, Context); \
  void launch_activation_coefficients_grad(const CoefficientGradArgs<T>&, Context)
PREPARED_DECLARE(float, CpuContext);
PREPARED_DECLARE(double, CpuContext);
PREPARED_DECLARE(float, CudaContext);
PREPARED_DECLARE(double, CudaContext);
#undef PREPARED_DECLARE

template <class Args>
PREPARED_HD Neuron read_neuron(const Args& args, int64_t i) {
  const bool has_alpha = args.alpha != nullptr;
  const auto* alpha = has_alpha ? args.alpha : args.lower;  // any readable number when absent
  return {static_cast<double>(args.lower[i]), static_cast<double>(args.upper[i]),
          static_cast<double>(alpha[i]), has_alpha};
}

// Writes element i; returns 1 when its input is invalid, in which case every output is NaN.
template <class Rule, class T>
PREPARED_HD int64_t write_coefficients(const Rule& rule, const CoefficientArgs<T>& args,
                                       int64_t i) {
  const Neuron neuron = read_neuron(args, i);
  const bool valid = neuron.valid();
  const T poison = static_cast<T>(valid ? 0.0 : kInf - kInf);
  const LinePair<T> lines = rule.template lines<T>(neuron);
  args.out[0][i] = lines.lower_slope + poison;
  args.out[1][i] = lines.lower_offset + poison;
  args.out[2][i] = lines.upper_slope + poison;
  args.out[3][i] = lines.upper_offset + poison;
  return valid ? 0 : 1;
}

template <class Rule, class T>
PREPARED_HD void write_gradient(const Rule& rule, const CoefficientGradArgs<T>& args, int64_t i) {
  const LineGradient g = {
      static_cast<double>(args.grads[0][i]), static_cast<double>(args.grads[1][i]),
      static_cast<double>(args.grads[2][i]), static_cast<double>(args.grads[3][i])};
  const BoundsGradient total = rule.gradient(read_neuron(args, i), g);
  args.grad_lower[i] = static_cast<T>(total.lower);
  args.grad_upper[i] = static_cast<T>(total.upper);
  if (args.grad_alpha == nullptr) return;
  args.grad_alpha[i] = static_cast<T>(total.alpha);
  args.grad_alpha[args.count + i] = static_cast<T>(total.inward);
}

// Calls f with the rule object of args.kind.
template <class Args, class F>
void with_rule(const Args& args, F&& f) {
  switch (args.kind) {
    case Kind::kLeaky:
      return f(LeakyRule(args.parameter));
    case Kind::kTanh:
      return f(SmoothRule<Tanh>(args.parameter));
    case Kind::kSigmoid:
      return f(SmoothRule<Sigmoid>(args.parameter));
    case Kind::kElu:
      return f(SmoothRule<Elu>(args.parameter));
    case Kind::kSoftplus:
      return f(SmoothRule<Softplus>(args.parameter));
    case Kind::kGelu:
      return f(SmoothRule<Gelu>(args.parameter));
    case Kind::kGeluTanh:
      return f(SmoothRule<GeluTanh>(args.parameter));
    case Kind::kSilu:
      return f(SmoothRule<Silu>(args.parameter));
  }
}

}  // namespace torch_prepared
