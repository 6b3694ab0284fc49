// Tensor wrappers of activation_coefficients and its gradient, for any backend.
#pragma once

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "../common/checks.h"
#include "../ops/activation_coefficients.h"

namespace torch_prepared {

struct KindAndParameter {
  Kind kind;
  double parameter;
};

// The parameter is narrowed to the bounds' dtype first, as torch's own activations do.
inline KindAndParameter parse_kind(const char* op, const std::string& name, double parameter,
                                   const Tensor& like) {
  if (like.scalar_type() == ScalarType::Float) parameter = static_cast<float>(parameter);
  if (name == "relu") return {Kind::kLeaky, 0.0};
  if (name == "leaky_relu") {
    if (!(parameter >= 0.0 && parameter <= 1.0)) {
      fail(op, "param", "a slope in [0, 1] for leaky_relu", std::to_string(parameter));
    }
    return {Kind::kLeaky, parameter};
  }
  if (name == "elu") {
    if (!(parameter >= 0.0 && parameter <= 1e6)) {
      fail(op, "param", "a scale in [0, 1e6] for elu", std::to_string(parameter));
    }
    return {Kind::kElu, parameter};
  }
  if (name == "tanh") return {Kind::kTanh, 0.0};
  if (name == "sigmoid") return {Kind::kSigmoid, 0.0};
  if (name == "softplus") return {Kind::kSoftplus, 0.0};
  if (name == "gelu") return {Kind::kGelu, 0.0};
  if (name == "gelu_tanh") return {Kind::kGeluTanh, 0.0};
  if (name == "silu") return {Kind::kSilu, 0.0};
  fail(op, "kind", "relu, leaky_relu, tanh, sigmoid, elu, softplus, gelu, gelu_tanh or silu", name);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape(tensor.dim());
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = tensor.size(static_cast<int64_t>(i));
  return shape;
}

inline void check_same(const char* op, const char* argument, const Tensor& tensor,
                       const Tensor& like) {
  check_floating(op, argument, tensor);
  if (tensor.scalar_type() != like.scalar_type() || shape_of(tensor) != shape_of(like)) {
    fail(op, argument, describe(like) + " like 'lower'", describe(tensor));
  }
  if (!same_device(tensor, like)) fail(op, argument, "the device of 'lower'", "another");
}

template <class T>
const T* optional_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->template const_data_ptr<T>() : nullptr;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> activation_coefficients(
    Tensor lower, Tensor upper, std::string kind, double param, std::optional<Tensor> alpha) {
  const char* op = "activation_coefficients";
  check_floating(op, "lower", lower);
  check_same(op, "upper", upper, lower);
  if (alpha.has_value()) check_same(op, "alpha", *alpha, lower);
  const KindAndParameter chosen = parse_kind(op, kind, param, lower);
  const Backend backend(lower);
  lower = dense(lower);
  upper = dense(upper);
  if (alpha.has_value()) alpha = dense(*alpha);
  const std::vector<int64_t> shape = shape_of(lower);
  std::array<Tensor, 4> out = {allocate(lower, shape), allocate(lower, shape),
                               allocate(lower, shape), allocate(lower, shape)};
  Tensor errors = allocate_zeros(lower, {1}, ScalarType::Long);
  if (lower.numel() > 0) {
    with_scalar(lower, [&](auto zero) {
      using T = decltype(zero);
      CoefficientArgs<T> args = {chosen.kind,
                                 chosen.parameter,
                                 lower.numel(),
                                 lower.template const_data_ptr<T>(),
                                 upper.template const_data_ptr<T>(),
                                 optional_pointer<T>(alpha),
                                 {},
                                 errors.template mutable_data_ptr<int64_t>()};
      for (size_t i = 0; i < out.size(); ++i) {
        args.out[i] = out[i].template mutable_data_ptr<T>();
      }
      launch_activation_coefficients(args, backend.context());
    });
  }
  return {out[0], out[1], out[2], out[3], errors};
}

// Gradients of lower, upper and alpha (empty when there is no alpha, else one axis more of size 2).
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> activation_coefficients_grad(
    Tensor grad_lower_slope, Tensor grad_lower_offset, Tensor grad_upper_slope,
    Tensor grad_upper_offset, Tensor lower, Tensor upper, std::string kind, double param,
    std::optional<Tensor> alpha) {
  const char* op = "activation_coefficients_grad";
  check_floating(op, "lower", lower);
  check_same(op, "upper", upper, lower);
  if (alpha.has_value()) check_same(op, "alpha", *alpha, lower);
  std::array<Tensor, 4> grads = {grad_lower_slope, grad_lower_offset, grad_upper_slope,
                                 grad_upper_offset};
  for (const Tensor& grad : grads) check_same(op, "grad", grad, lower);
  const KindAndParameter chosen = parse_kind(op, kind, param, lower);
  const Backend backend(lower);
  lower = dense(lower);
  upper = dense(upper);
  if (alpha.has_value()) alpha = dense(*alpha);
  for (Tensor& grad : grads) grad = dense(grad);
  const std::vector<int64_t> shape = shape_of(lower);
  Tensor grad_lower = allocate(lower, shape), grad_upper = allocate(lower, shape);
  std::vector<int64_t> both = shape;
  both.insert(both.begin(), 2);
  Tensor grad_alpha = alpha.has_value() ? allocate(lower, both) : allocate(lower, {0});
  if (lower.numel() > 0) {
    with_scalar(lower, [&](auto zero) {
      using T = decltype(zero);
      CoefficientGradArgs<T> args = {
          chosen.kind,
          chosen.parameter,
          lower.numel(),
          lower.template const_data_ptr<T>(),
          upper.template const_data_ptr<T>(),
          optional_pointer<T>(alpha),
          {},
          grad_lower.template mutable_data_ptr<T>(),
          grad_upper.template mutable_data_ptr<T>(),
          alpha.has_value() ? grad_alpha.template mutable_data_ptr<T>() : nullptr};
      for (size_t i = 0; i < grads.size(); ++i) {
        args.grads[i] = grads[i].template const_data_ptr<T>();
      }
      launch_activation_coefficients_grad(args, backend.context());
    });
  }
  return {grad_lower, grad_upper, grad_alpha};
}

}  // namespace torch_prepared
