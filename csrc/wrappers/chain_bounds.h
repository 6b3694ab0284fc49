// Tensor wrapper of chain_bounds, for any backend.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "../ops/chain_bounds.h"

namespace torch_prepared {

struct ChainShape {
  int64_t boxes, inputs, outputs, hidden;  // hidden: scalars of all values between the maps
};

// Checks that boxes and maps fit each other and makes the maps dense.
inline ChainShape check_chain(const char* op, const Tensor& lower, const Tensor& upper,
                              std::vector<Tensor>& weights, std::vector<Tensor>& biases) {
  check_floating(op, "lower", lower);
  check_like(op, "lower", lower, lower, {-1, -1});
  check_like(op, "upper", upper, lower, {lower.size(0), lower.size(1)});
  if (weights.empty() || weights.size() != biases.size()) {
    fail(op, "weights", "one or more, and as many biases",
         std::to_string(weights.size()) + " and " + std::to_string(biases.size()));
  }
  ChainShape shape = {lower.size(0), lower.size(1), lower.size(1), 0};
  for (size_t k = 0; k < weights.size(); ++k) {
    const std::string index = "[" + std::to_string(k) + "]";
    check_like(op, ("weights" + index).c_str(), weights[k], lower, {-1, shape.outputs});
    if (k > 0) shape.hidden += shape.outputs;
    shape.outputs = weights[k].size(0);
    check_like(op, ("biases" + index).c_str(), biases[k], lower, {shape.outputs});
    weights[k] = dense(weights[k]);
    biases[k] = dense(biases[k]);
  }
  return shape;
}

template <class T>
std::vector<ChainMap<T>> chain_maps(const std::vector<Tensor>& weights,
                                    const std::vector<Tensor>& biases) {
  std::vector<ChainMap<T>> maps;
  for (size_t k = 0; k < weights.size(); ++k) {
    maps.push_back({weights[k].size(1), weights[k].size(0), weights[k].template const_data_ptr<T>(),
                    biases[k].template const_data_ptr<T>()});
  }
  return maps;
}

inline void check_known(const Tensor& lower, std::optional<Tensor>& known_lower,
                        std::optional<Tensor>& known_upper, int64_t hidden) {
  const char* op = "chain_bounds";
  if (known_lower.has_value() != known_upper.has_value()) {
    fail(op, "known_lower", "both ends of the known intervals or neither", "one");
  }
  if (!known_lower.has_value()) return;
  check_like(op, "known_lower", *known_lower, lower, {lower.size(0), hidden});
  check_like(op, "known_upper", *known_upper, lower, {lower.size(0), hidden});
  known_lower = dense(*known_lower);
  known_upper = dense(*known_upper);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> chain_bounds(Tensor lower, Tensor upper,
                                                        std::vector<Tensor> weights,
                                                        std::vector<Tensor> biases, Tensor rows,
                                                        std::optional<Tensor> known_lower,
                                                        std::optional<Tensor> known_upper) {
  const char* op = "chain_bounds";
  const ChainShape shape = check_chain(op, lower, upper, weights, biases);
  const int64_t b = shape.boxes, n = shape.inputs, m = shape.outputs, hidden = shape.hidden;
  const bool shared = rows.dim() == 2;
  if (shared) {
    check_like(op, "rows", rows, lower, {-1, m});
  } else {
    check_like(op, "rows", rows, lower, {b, -1, m});
  }
  check_known(lower, known_lower, known_upper, hidden);
  const Backend backend(lower);
  lower = dense(lower);
  upper = dense(upper);
  rows = dense(rows);
  const int64_t s = rows.size(shared ? 0 : 1);
  Tensor values = allocate(lower, {b, s}), input_rows = allocate(lower, {b, s, n});
  Tensor hidden_lower = allocate(lower, {b, hidden}), hidden_upper = allocate(lower, {b, hidden});
  if (b == 0) return {values, input_rows, hidden_lower, hidden_upper};
  with_scalar(lower, [&](auto zero) {
    using T = decltype(zero);
    ChainBoundsArgs<T> args;
    args.maps = chain_maps<T>(weights, biases);
    const bool known = known_lower.has_value();
    args.boxes = b;
    args.hidden = hidden;
    args.count = s;
    args.row_stride = shared ? 0 : s * m;
    args.lower = lower.template const_data_ptr<T>();
    args.upper = upper.template const_data_ptr<T>();
    args.rows = rows.template const_data_ptr<T>();
    args.known_lower = known ? known_lower->template const_data_ptr<T>() : nullptr;
    args.known_upper = known ? known_upper->template const_data_ptr<T>() : nullptr;
    args.values = values.template mutable_data_ptr<T>();
    args.input_rows = input_rows.template mutable_data_ptr<T>();
    args.hidden_lower = hidden_lower.template mutable_data_ptr<T>();
    args.hidden_upper = hidden_upper.template mutable_data_ptr<T>();
    launch_chain_bounds(args, backend.context());
  });
  return {values, input_rows, hidden_lower, hidden_upper};
}

}  // namespace torch_prepared
