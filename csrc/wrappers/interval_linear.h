// Tensor wrapper of interval_linear, for any backend.
//
// The two products run in binary64 on the library's matrix multiplication whatever the dtype, so
// reduced-precision modes of binary32 products (TF32, bfloat16) cannot weaken the enclosure.
#pragma once

#include <optional>
#include <tuple>

#include "../common/checks.h"
#include "../ops/interval_linear.h"

namespace torch_prepared {

template <class Backend>
std::tuple<Tensor, Tensor> interval_linear(Tensor lower, Tensor upper, Tensor weight,
                                           std::optional<Tensor> bias) {
  const char* op = "interval_linear";
  check_floating(op, "lower", lower);
  check_like(op, "lower", lower, lower, {-1, -1});
  const int64_t b = lower.size(0), n = lower.size(1);
  check_like(op, "upper", upper, lower, {b, n});
  check_like(op, "weight", weight, lower, {-1, n});
  const int64_t m = weight.size(0);
  if (bias.has_value()) check_like(op, "bias", *bias, lower, {m});
  const Backend backend(lower);
  lower = dense(lower);
  upper = dense(upper);
  weight = dense(weight);
  if (bias.has_value()) bias = dense(*bias);
  Tensor out_lower = allocate(lower, {b, m}), out_upper = allocate(lower, {b, m});
  if (b == 0 || m == 0) return {out_lower, out_upper};
  const ScalarType wide = ScalarType::Double;
  Tensor center = allocate(lower, {b, n}, wide), radius = allocate(lower, {b, n}, wide);
  Tensor signed_weight = allocate(lower, {m, n}, wide), absolute = allocate(lower, {m, n}, wide);
  with_scalar(lower, [&](auto zero) {
    using T = decltype(zero);
    if (n > 0) {
      launch_split_interval(SplitIntervalArgs<T>{b * n, n, lower.template const_data_ptr<T>(),
                                                 upper.template const_data_ptr<T>(),
                                                 center.template mutable_data_ptr<double>(),
                                                 radius.template mutable_data_ptr<double>()},
                            backend.context());
      launch_split_weight(SplitWeightArgs<T>{m * n, weight.template const_data_ptr<T>(),
                                             signed_weight.template mutable_data_ptr<double>(),
                                             absolute.template mutable_data_ptr<double>()},
                          backend.context());
    }
    const Tensor middle =
        torch::stable::matmul(center, torch::stable::transpose(signed_weight, 0, 1));
    const Tensor spread = torch::stable::matmul(radius, torch::stable::transpose(absolute, 0, 1));
    launch_join_interval(
        JoinIntervalArgs<T>{b * m, m, n, middle.template const_data_ptr<double>(),
                            spread.template const_data_ptr<double>(),
                            bias.has_value() ? bias->template const_data_ptr<T>() : nullptr,
                            out_lower.template mutable_data_ptr<T>(),
                            out_upper.template mutable_data_ptr<T>()},
        backend.context());
  });
  return {out_lower, out_upper};
}

}  // namespace torch_prepared
