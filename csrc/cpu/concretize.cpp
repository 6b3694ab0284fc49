// CPU kernel of concretize.
#include "../wrappers/concretize.h"

#include "../common/config.h"
#include "backend.h"

namespace torch_prepared {
namespace {

// sum_j r_j center_j - |r_j| radius_j
template <class T>
PREPARED_HD T support(const T* __restrict rows, const T* __restrict center,
                      const T* __restrict radius, int64_t n) {
  T total = T(0);
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    const T r = rows[j];
    total += r * center[j] - (r < T(0) ? -r : r) * radius[j];
  }
  return total;
}

template <class T>
PREPARED_HD void support_rows(const ConcretizeArgs<T>& args, int64_t begin, int64_t end) {
  const RowGroups& layout = args.layout;
  const int64_t n = layout.size;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t g = i / layout.members, row = layout.row(g, i % layout.members);
    args.out[row] = support(args.rows + row * n, args.center + g * n, args.radius + g * n, n);
  }
}

PREPARED_CLONES void run(const ConcretizeArgs<float>& args, int64_t begin, int64_t end) {
  support_rows(args, begin, end);
}

PREPARED_CLONES void run(const ConcretizeArgs<double>& args, int64_t begin, int64_t end) {
  support_rows(args, begin, end);
}

template <class T>
void run_all(const ConcretizeArgs<T>& args) {
  parallel_over(args.layout.rows(), args.layout.size,
                [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace

void launch_concretize(const ConcretizeArgs<float>& args, CpuContext) { run_all(args); }
void launch_concretize(const ConcretizeArgs<double>& args, CpuContext) { run_all(args); }

}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CPU, m) {
  m.impl("concretize", TORCH_BOX(&torch_prepared::concretize<torch_prepared::CpuBackend>));
}
