// interval_linear: arguments and launchers of the passes around two library products.
#pragma once

#include <stdint.h>

#include "../common/context.h"
#include "../common/rounding.h"

namespace torch_prepared {

// gamma_k = k u / (1 - k u) with u = 2^-53, rounded up generously: bounds the relative error of
// a sum of k products in any order, with or without fused multiply-add.
PREPARED_HD double summation_error(int64_t terms) {
  return (static_cast<double>(terms) + 4.0) * kEps;
}

// center = (lower + upper) / 2 and a radius inflated so that, in binary64 and for every
// summation order, |exact row - computed weight @ center| <= |weight| @ radius.
template <class T>
struct SplitIntervalArgs {
  int64_t count, terms;
  const T* lower;
  const T* upper;
  double* center;
  double* radius;
};

// weight and |weight| in binary64.
template <class T>
struct SplitWeightArgs {
  int64_t count;
  const T* weight;
  double* signed_weight;
  double* absolute_weight;
};

// [middle - spread, middle + spread] plus bias (m,), rounded outward to T.
template <class T>
struct JoinIntervalArgs {
  int64_t count, columns, terms;
  const double* middle;
  const double* spread;
  const T* bias;  // null when absent
  T* lower;
  T* upper;
};

#define PREPARED_DECLARE(T, Context)                                \
  void launch_split_interval(const SplitIntervalArgs<T>&, Context); \
  void launch_split_weight(const SplitWeightArgs<T>&, Context);     \
  void launch_join_interval(const JoinIntervalArgs<T>&, Context)
PREPARED_DECLARE(float, CpuContext);
PREPARED_DECLARE(double, CpuContext);
PREPARED_DECLARE(float, CudaContext);
PREPARED_DECLARE(double, CudaContext);
#undef PREPARED_DECLARE

template <class T>
PREPARED_HD void split_interval(const SplitIntervalArgs<T>& args, int64_t i) {
  const double lower = static_cast<double>(args.lower[i]);
  const double upper = static_cast<double>(args.upper[i]);
  const double center = 0.5 * lower + 0.5 * upper;
  const double radius = greater(sub_up(upper, center), sub_up(center, lower));
  const double doubt = mul_up(summation_error(args.terms), fabs(center));
  const double poison = lower <= upper ? 0.0 : kInf - kInf;
  args.center[i] = center + poison;
  args.radius[i] = add_up(radius, doubt) + poison;
}

template <class T>
PREPARED_HD void split_weight(const SplitWeightArgs<T>& args, int64_t i) {
  const double weight = static_cast<double>(args.weight[i]);
  args.signed_weight[i] = weight;
  args.absolute_weight[i] = fabs(weight);
}

// Element i, which lies in this column.
template <class T>
PREPARED_HD void join_interval(const JoinIntervalArgs<T>& args, int64_t i, int64_t column) {
  const double terms = static_cast<double>(args.terms);
  const double growth = 1.0 + 2.0 * summation_error(args.terms);
  const double spread = add_up(mul_up(args.spread[i], growth), 4.0 * (terms + 1.0) * kTiny);
  const double bias = args.bias ? static_cast<double>(args.bias[column]) : 0.0;
  const double middle = args.middle[i];
  args.lower[i] = narrow_down<T>(add_down(add_down(middle, -spread), bias));
  args.upper[i] = narrow_up<T>(add_up(add_up(middle, spread), bias));
}

}  // namespace torch_prepared
