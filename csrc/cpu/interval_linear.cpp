// CPU passes of interval_linear around the library's matrix products.
#include "../wrappers/interval_linear.h"

#include <algorithm>

#include "../common/config.h"
#include "backend.h"

namespace torch_prepared {
namespace {

// Arguments come by value: locals that nothing aliases are what lets the loops vectorize.
template <class T>
PREPARED_HD void split_intervals(const SplitIntervalArgs<T> args, int64_t begin, int64_t end) {
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) split_interval(args, i);
}

template <class T>
PREPARED_HD void split_weights(const SplitWeightArgs<T> args, int64_t begin, int64_t end) {
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) split_weight(args, i);
}

// Elements of one row after another, so that columns need no division.
template <class T>
PREPARED_HD void join_intervals(const JoinIntervalArgs<T> args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t first = begin - begin % args.columns;
    const int64_t last = std::min(end, first + args.columns);
#pragma GCC ivdep
    for (int64_t i = begin; i < last; ++i) join_interval(args, i, i - first);
    begin = last;
  }
}

#define PREPARED_PASS(Args, body) \
  PREPARED_CLONES void run(const Args& args, int64_t begin, int64_t end) { body(args, begin, end); }
PREPARED_PASS(SplitIntervalArgs<float>, split_intervals)
PREPARED_PASS(SplitIntervalArgs<double>, split_intervals)
PREPARED_PASS(SplitWeightArgs<float>, split_weights)
PREPARED_PASS(SplitWeightArgs<double>, split_weights)
PREPARED_PASS(JoinIntervalArgs<float>, join_intervals)
PREPARED_PASS(JoinIntervalArgs<double>, join_intervals)
#undef PREPARED_PASS

template <class Args>
void run_all(const Args& args) {
  parallel_over(args.count, 1, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace

void launch_split_interval(const SplitIntervalArgs<float>& args, CpuContext) { run_all(args); }
void launch_split_interval(const SplitIntervalArgs<double>& args, CpuContext) { run_all(args); }
void launch_split_weight(const SplitWeightArgs<float>& args, CpuContext) { run_all(args); }
void launch_split_weight(const SplitWeightArgs<double>& args, CpuContext) { run_all(args); }
void launch_join_interval(const JoinIntervalArgs<float>& args, CpuContext) { run_all(args); }
void launch_join_interval(const JoinIntervalArgs<double>& args, CpuContext) { run_all(args); }

}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CPU, m) {
  m.impl("interval_linear",
         TORCH_BOX(&torch_prepared::interval_linear<torch_prepared::CpuBackend>));
}
