// Argument checks: every message names the operator, the argument, what was expected and got.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace torch_prepared {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << torch::headeronly::toString(tensor.scalar_type()) << " (";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ")";
  return text.str();
}

[[noreturn]] inline void fail(const char* op, const char* argument, const std::string& expected,
                              const std::string& got) {
  throw std::runtime_error(std::string(op) + ": argument '" + argument + "': expected " + expected +
                           ", got " + got);
}

inline void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) {
    fail(op, argument, "float32 or float64", describe(tensor));
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

// Shape (-1: any size), dtype and device of `like`.
inline void check_like(const char* op, const char* argument, const Tensor& tensor,
                       const Tensor& like, std::initializer_list<int64_t> shape) {
  if (tensor.scalar_type() != like.scalar_type()) {
    fail(op, argument, torch::headeronly::toString(like.scalar_type()), describe(tensor));
  }
  if (!same_device(tensor, like)) fail(op, argument, "the other arguments' device", "another");
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream expected;
  expected << "shape (";
  int64_t axis = 0;
  for (const int64_t size : shape) {
    fits = fits && (size < 0 || tensor.size(axis) == size);
    if (axis > 0) expected << ", ";
    if (size < 0) {
      expected << "any";
    } else {
      expected << size;
    }
    ++axis;
  }
  if (!fits) fail(op, argument, expected.str() + ")", describe(tensor));
}

// A size that must equal `full` or broadcast from 1.
inline void check_broadcast(const char* op, const char* argument, const Tensor& tensor,
                            int64_t axis, int64_t full) {
  if (tensor.size(axis) != full && tensor.size(axis) != 1) {
    fail(op, argument, "size " + std::to_string(full) + " or 1 on axis " + std::to_string(axis),
         describe(tensor));
  }
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor allocate(const Tensor& like, std::vector<int64_t> shape,
                       std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, shape, type);
}

inline Tensor allocate_zeros(const Tensor& like, std::vector<int64_t> shape,
                             std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_zeros(like, shape, type);
}

// Calls f with a value of the tensor's scalar type.
template <class F>
void with_scalar(const Tensor& tensor, F&& f) {
  if (tensor.scalar_type() == ScalarType::Float) {
    f(float{});
  } else {
    f(double{});
  }
}

}  // namespace torch_prepared
