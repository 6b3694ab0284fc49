// CPU kernels of activation_coefficients and its gradient.
#include "../wrappers/activation_coefficients.h"

#include <algorithm>
#include <atomic>

#include "../common/config.h"
#include "backend.h"
#include "leaky_lines.h"

namespace torch_prepared {
namespace {

// Arguments come by value: locals that nothing aliases are what lets the loop vectorize.
template <class Rule, class T>
PREPARED_HD int64_t write_range(const Rule rule, const CoefficientArgs<T> args, int64_t begin,
                                int64_t end) {
  int64_t errors = 0;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) errors += write_coefficients(rule, args, i);
  return errors;
}

// Piecewise-linear kinds are bound by memory, so their loops are worth vectorizing.
PREPARED_CLONES int64_t write_leaky_clones(const LeakyRule& rule,
                                           const CoefficientArgs<float>& args, int64_t begin,
                                           int64_t end) {
  return write_range(rule, args, begin, end);
}

PREPARED_CLONES int64_t write_leaky(const LeakyRule& rule, const CoefficientArgs<double>& args,
                                    int64_t begin, int64_t end) {
  return write_range(rule, args, begin, end);
}

// Blocks in vectors with directed rounding where the processor has it, and the rest as above.
// Outputs that no cache holds go around it: else each line would be read before it is written.
int64_t write_leaky(const LeakyRule& rule, const CoefficientArgs<float>& args, int64_t begin,
                    int64_t end) {
#ifdef PREPARED_X86
  if (has_512()) {
    const int64_t bytes = 4 * args.count * static_cast<int64_t>(sizeof(float));
    const int64_t lead = bytes >= kStreamedBytes ? until_aligned(args, begin) : -1;
    const int64_t first = lead < 0 ? begin : std::min(end, begin + lead);
    const int64_t last = first + (end - first) / kAtOnce * kAtOnce;
    const int64_t errors = lead < 0 ? write_blocks<false>(rule.p, args, first, last)
                                    : write_blocks<true>(rule.p, args, first, last);
    return errors + write_leaky_clones(rule, args, begin, first) +
           write_leaky_clones(rule, args, last, end);
  }
#endif
  return write_leaky_clones(rule, args, begin, end);
}

template <class T>
int64_t write_any(const LeakyRule& rule, const CoefficientArgs<T>& args, int64_t begin,
                  int64_t end) {
  return write_leaky(rule, args, begin, end);
}

template <class Activation, class T>
int64_t write_any(const SmoothRule<Activation>& rule, const CoefficientArgs<T>& args, int64_t begin,
                  int64_t end) {
  return write_range(rule, args, begin, end);
}

constexpr int64_t kCostPerElement = 16;

template <class T>
void write_all(const CoefficientArgs<T>& args) {
  with_rule(args, [&](const auto& rule) {
    std::atomic<int64_t> errors{0};
    parallel_over(args.count, kCostPerElement,
                  [&](int64_t begin, int64_t end) { errors += write_any(rule, args, begin, end); });
    *args.errors = errors;
  });
}

template <class T>
void write_gradients(const CoefficientGradArgs<T>& args) {
  with_rule(args, [&](const auto& rule) {
    parallel_over(args.count, kCostPerElement, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) write_gradient(rule, args, i);
    });
  });
}

}  // namespace

void launch_activation_coefficients(const CoefficientArgs<float>& args, CpuContext) {
  write_all(args);
}
void launch_activation_coefficients(const CoefficientArgs<double>& args, CpuContext) {
  write_all(args);
}
void launch_activation_coefficients_grad(const CoefficientGradArgs<float>& args, CpuContext) {
  write_gradients(args);
}
void launch_activation_coefficients_grad(const CoefficientGradArgs<double>& args, CpuContext) {
  write_gradients(args);
}

}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CPU, m) {
  m.impl("activation_coefficients",
         TORCH_BOX(&torch_prepared::activation_coefficients<torch_prepared::CpuBackend>));
  m.impl("activation_coefficients_grad",
         TORCH_BOX(&torch_prepared::activation_coefficients_grad<torch_prepared::CpuBackend>));
}
