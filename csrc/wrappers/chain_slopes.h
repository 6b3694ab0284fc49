// Tensor wrapper of chain_slopes, for any backend.
#pragma once

#include <tuple>
#include <vector>

#include "../ops/chain_slopes.h"
#include "chain_bounds.h"

namespace torch_prepared {

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> chain_slopes(
    Tensor lower, Tensor upper, std::vector<Tensor> weights, std::vector<Tensor> biases,
    Tensor rows, Tensor row, Tensor enough, Tensor slopes, int64_t iterations, double rate,
    double decay, double momentum, double square_momentum, int64_t levels, int64_t patience) {
  const char* op = "chain_slopes";
  const ChainShape shape = check_chain(op, lower, upper, weights, biases);
  const int64_t b = shape.boxes, n = shape.inputs, hidden = shape.hidden;
  check_like(op, "rows", rows, lower, {-1, shape.outputs});
  check_like(op, "enough", enough, lower, {b});
  check_like(op, "slopes", slopes, lower, {b, hidden});
  if (row.scalar_type() != ScalarType::Long || row.dim() != 1 || row.size(0) != b) {
    fail(op, "row", "int64, one per box", "another dtype or shape");
  }
  if (levels < 1) fail(op, "levels", "a positive number", std::to_string(levels));
  const Backend backend(lower);
  for (Tensor* each : {&lower, &upper, &rows, &row, &enough, &slopes}) *each = dense(*each);
  const int64_t s = rows.size(0);
  Tensor found = allocate(lower, {b, hidden}), values = allocate(lower, {b, s});
  Tensor input_rows = allocate(lower, {b, s, n}), ends = allocate(lower, {2, b, hidden});
  if (b == 0) return {found, values, input_rows};
  const int64_t* const chosen = row.template const_data_ptr<int64_t>();
  for (int64_t i = 0; i < b; ++i) {
    if (chosen[i] < 0 || chosen[i] >= s) fail(op, "row", "numbers of rows", "one out of range");
  }
  with_scalar(lower, [&](auto zero) {
    using T = decltype(zero);
    ChainSlopesArgs<T> args;
    args.bounds.maps = chain_maps<T>(weights, biases);
    args.bounds.boxes = b;
    args.bounds.hidden = hidden;
    args.bounds.count = s;
    args.bounds.row_stride = 0;
    args.bounds.lower = lower.template const_data_ptr<T>();
    args.bounds.upper = upper.template const_data_ptr<T>();
    args.bounds.rows = rows.template const_data_ptr<T>();
    args.bounds.known_lower = args.bounds.known_upper = nullptr;
    args.bounds.values = values.template mutable_data_ptr<T>();
    args.bounds.input_rows = input_rows.template mutable_data_ptr<T>();
    args.bounds.hidden_lower = ends.template mutable_data_ptr<T>();
    args.bounds.hidden_upper = args.bounds.hidden_lower + b * hidden;
    args.search = {iterations, rate, decay, momentum, square_momentum, levels, patience};
    args.row = chosen;
    args.enough = enough.template const_data_ptr<T>();
    args.given = slopes.template const_data_ptr<T>();
    args.slopes = found.template mutable_data_ptr<T>();
    launch_chain_slopes(args, backend.context());
  });
  return {found, values, input_rows};
}

}  // namespace torch_prepared
