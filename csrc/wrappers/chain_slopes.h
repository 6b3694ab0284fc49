// Tensor wrapper of chain_slopes, for any backend.
#pragma once

#include <tuple>
#include <vector>

#include "../ops/chain_slopes.h"
#include "chain_bounds.h"

namespace torch_prepared {

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> chain_slopes(Tensor lower, Tensor upper,
                                                std::vector<Tensor> weights,
                                                std::vector<Tensor> biases, Tensor rows, Tensor row,
                                                Tensor enough, Tensor slopes, int64_t iterations,
                                                double rate, double decay) {
  const char* op = "chain_slopes";
  check_floating(op, "lower", lower);
  check_like(op, "lower", lower, lower, {-1, -1});
  const int64_t b = lower.size(0), n = lower.size(1);
  check_like(op, "upper", upper, lower, {b, n});
  const std::vector<int64_t> sizes = check_chain(lower, weights, biases);
  int64_t hidden = 0;
  for (size_t k = 1; k + 1 < sizes.size(); ++k) hidden += sizes[k];
  check_like(op, "rows", rows, lower, {-1, sizes.back()});
  check_like(op, "enough", enough, lower, {b});
  check_like(op, "slopes", slopes, lower, {b, hidden});
  if (row.scalar_type() != ScalarType::Long || row.dim() != 1 ||
      row.size(0) != b) {
    fail(op, "row", "int64, one per box", "another dtype or shape");
  }
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
    for (size_t k = 0; k < weights.size(); ++k) {
      args.bounds.maps.push_back({sizes[k], sizes[k + 1],
                                  weights[k].template const_data_ptr<T>(),
                                  biases[k].template const_data_ptr<T>()});
    }
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
    args.search = {iterations, rate, decay};
    args.row = chosen;
    args.enough = enough.template const_data_ptr<T>();
    args.given = slopes.template const_data_ptr<T>();
    args.slopes = found.template mutable_data_ptr<T>();
    launch_chain_slopes(args, backend.context());
  });
  return {found, values, input_rows};
}

}  // namespace torch_prepared
