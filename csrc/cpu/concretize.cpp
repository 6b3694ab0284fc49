// CPU kernel of concretize.
#include "../wrappers/concretize.h"

#include "../common/config.h"
#include "backend.h"
#include "row_blocks.h"
#include "vector_jobs.h"

namespace torch_prepared {
namespace {

constexpr int64_t kAhead = 4096;  // bytes read ahead; processors do not cross pages on their own

// Blocks of rows: sum_j r_j center_j - |r_j| radius_j.
template <class T>
struct SupportJob {
  const ConcretizeArgs<T>& args;
  int64_t begin, end;

  template <int kBytes>
  PREPARED_HD void run() const {
    over_blocks<T>(args.layout, begin, end, 2,
                   [&](auto rows, int64_t member, int64_t group) PREPARED_INLINE {
                     if (args.layout.size >= lanes<T, kBytes>) {
                       support<kBytes, decltype(rows)::value>(member, group);
                     } else {
                       support<sizeof(T), decltype(rows)::value>(member, group);
                     }
                   });
  }

  template <int kBytes, int kRows>
  PREPARED_HD void support(int64_t member, int64_t group) const {
    using V = Vector<T, kBytes>;
    const RowGroups& layout = args.layout;
    const int64_t n = layout.size, step = layout.member_stride * n;
    const int64_t first = layout.row(group, member);
    const T* const rows = args.rows + first * n;
    const T *const center = args.center + group * n, *const radius = args.radius + group * n;
    V sums[kRows] = {}, spreads[kRows] = {};
    over_columns<T, kBytes>(n, [&](int64_t j, auto overlaps) PREPARED_INLINE {
      const V middle = load<T, kBytes>(center + j), reach = load<T, kBytes>(radius + j);
      for (int q = 0; q < kRows; ++q) {
        const T* const from = rows + q * step + j;
        __builtin_prefetch(from + kAhead / sizeof(T));
        const V r = load<T, kBytes>(from);
        V sum = r * middle, spread = (r < 0 ? -r : r) * reach;
        if (overlaps) {
          sum = drop_first<T, kBytes>(sum, lanes<T, kBytes> - n % lanes<T, kBytes>);
          spread = drop_first<T, kBytes>(spread, lanes<T, kBytes> - n % lanes<T, kBytes>);
        }
        sums[q] += sum;
        spreads[q] += spread;
      }
    });
    for (int q = 0; q < kRows; ++q) {
      args.out[first + q * layout.member_stride] = sum_lanes<T, kBytes>(sums[q] - spreads[q]);
    }
  }
};

template <class T>
void run_all(const ConcretizeArgs<T>& args) {
  with_vectors([&](auto width) {
    constexpr int kBytes = decltype(width)::value;
    parallel_over(args.layout.rows(), args.layout.size, [&](int64_t begin, int64_t end) {
      run_job<kBytes>(SupportJob<T>{args, begin, end});
    });
  });
}

}  // namespace

void launch_concretize(const ConcretizeArgs<float>& args, CpuContext) { run_all(args); }
void launch_concretize(const ConcretizeArgs<double>& args, CpuContext) { run_all(args); }

}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CPU, m) {
  m.impl("concretize", TORCH_BOX(&torch_prepared::concretize<torch_prepared::CpuBackend>));
}
