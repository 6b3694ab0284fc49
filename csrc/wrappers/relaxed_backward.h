// Tensor wrappers of relaxed_backward and its gradient, for any backend.
#pragma once

#include <array>
#include <tuple>

#include "../common/checks.h"
#include "../ops/relaxed_backward.h"

namespace torch_prepared {

constexpr std::array<const char*, 4> kCoefficientNames = {"lower_slope", "lower_offset",
                                                          "upper_slope", "upper_offset"};

inline RowGroups check_rows(const char* op, const Tensor& rows,
                            const std::array<Tensor, 4>& coefficients) {
  check_floating(op, "rows", rows);
  check_like(op, "rows", rows, rows, {-1, -1, -1});
  const Tensor& first = coefficients[0];
  check_like(op, kCoefficientNames[0], first, rows, {-1, -1, rows.size(2)});
  check_broadcast(op, kCoefficientNames[0], first, 0, rows.size(0));
  check_broadcast(op, kCoefficientNames[0], first, 1, rows.size(1));
  for (size_t i = 1; i < coefficients.size(); ++i) {
    check_like(op, kCoefficientNames[i], coefficients[i], rows,
               {first.size(0), first.size(1), first.size(2)});
  }
  return group_rows(rows.size(0), rows.size(1), rows.size(2), first.size(0), first.size(1));
}

inline std::array<Tensor, 4> make_dense(const std::array<Tensor, 4>& tensors) {
  return {dense(tensors[0]), dense(tensors[1]), dense(tensors[2]), dense(tensors[3])};
}

template <class T>
void set_pointers(const T* (&pointers)[4], const std::array<Tensor, 4>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) pointers[i] = tensors[i].template const_data_ptr<T>();
}

template <class Backend>
std::tuple<Tensor, Tensor> relaxed_backward(Tensor rows, Tensor lower_slope, Tensor lower_offset,
                                            Tensor upper_slope, Tensor upper_offset) {
  const char* op = "relaxed_backward";
  std::array<Tensor, 4> coefficients = {lower_slope, lower_offset, upper_slope, upper_offset};
  const RowGroups layout = check_rows(op, rows, coefficients);
  const Backend backend(rows);
  rows = dense(rows);
  coefficients = make_dense(coefficients);
  const int64_t b = rows.size(0), s = rows.size(1), n = rows.size(2);
  Tensor out_rows = allocate(rows, {b, s, n});
  Tensor bias = n == 0 ? allocate_zeros(rows, {b, s}) : allocate(rows, {b, s});
  if (layout.rows() == 0 || n == 0) return {out_rows, bias};
  with_scalar(rows, [&](auto zero) {
    using T = decltype(zero);
    RelaxedBackwardArgs<T> args;
    args.layout = layout;
    args.rows = rows.template const_data_ptr<T>();
    set_pointers(args.coefficients, coefficients);
    args.out_rows = out_rows.template mutable_data_ptr<T>();
    args.bias = bias.template mutable_data_ptr<T>();
    launch_relaxed_backward(args, backend.context());
  });
  return {out_rows, bias};
}

// Returns the gradient of rows and that of the four coefficients stacked, (4, B, S, n).
template <class Backend>
std::tuple<Tensor, Tensor> relaxed_backward_grad(Tensor grad_rows, Tensor grad_bias, Tensor rows,
                                                 Tensor lower_slope, Tensor lower_offset,
                                                 Tensor upper_slope, Tensor upper_offset) {
  const char* op = "relaxed_backward_grad";
  std::array<Tensor, 4> coefficients = {lower_slope, lower_offset, upper_slope, upper_offset};
  const RowGroups layout = check_rows(op, rows, coefficients);
  const int64_t b = rows.size(0), s = rows.size(1), n = rows.size(2);
  check_like(op, "grad_rows", grad_rows, rows, {b, s, n});
  check_like(op, "grad_bias", grad_bias, rows, {b, s});
  const Backend backend(rows);
  rows = dense(rows);
  grad_rows = dense(grad_rows);
  grad_bias = dense(grad_bias);
  coefficients = make_dense(coefficients);
  const int64_t B = lower_slope.size(0), S = lower_slope.size(1);
  const int64_t pieces = count_pieces(layout, kRowsPerPiece);
  Tensor out_rows = allocate(rows, {b, s, n});
  if (layout.rows() == 0 || n == 0) return {out_rows, allocate_zeros(rows, {4, B, S, n})};
  Tensor partial = allocate(rows, {pieces, 4, B, S, n});
  with_scalar(rows, [&](auto zero) {
    using T = decltype(zero);
    RelaxedBackwardGradArgs<T> args;
    args.layout = layout;
    args.grad_rows = grad_rows.template const_data_ptr<T>();
    args.grad_bias = grad_bias.template const_data_ptr<T>();
    args.rows = rows.template const_data_ptr<T>();
    set_pointers(args.coefficients, coefficients);
    args.out_rows = out_rows.template mutable_data_ptr<T>();
    args.partial = partial.template mutable_data_ptr<T>();
    args.pieces = pieces;
    launch_relaxed_backward_grad(args, backend.context());
  });
  const std::array<int64_t, 1> first = {0};
  return {out_rows, torch::stable::sum(partial, first)};
}

}  // namespace torch_prepared
