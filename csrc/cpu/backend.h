// The CPU backend of the tensor wrappers, and the parallel loop of its kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/context.h"

namespace torch_prepared {

class CpuBackend {
 public:
  explicit CpuBackend(const torch::stable::Tensor&) {}
  CpuContext context() const { return {}; }
};

// Number of elements below which a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// Calls f(begin, end) on pieces of [0, count); each item stands for `weight` elements.
template <class F>
void parallel_over(int64_t count, int64_t weight, const F& f) {
  const int64_t grain = kGrain / (weight > 0 ? weight : 1);
  torch::stable::parallel_for(0, count, grain > 0 ? grain : 1, f);
}

}  // namespace torch_prepared
