// CPU kernels of relaxed_backward and its gradient.
#include "../wrappers/relaxed_backward.h"

#include <algorithm>

#include "../common/config.h"
#include "backend.h"
#include "row_blocks.h"
#include "vector_jobs.h"

namespace torch_prepared {
namespace {

// Blocks of rows: out = r * (r >= 0 ? lower_slope : upper_slope), and their biases.
template <class T>
struct PullJob {
  const RelaxedBackwardArgs<T>& args;
  int64_t begin, end;

  template <int kBytes>
  PREPARED_HD void run() const {
    over_blocks<T>(args.layout, begin, end, 4,
                   [&](auto rows, int64_t member, int64_t group) PREPARED_INLINE {
                     if (args.layout.size >= lanes<T, kBytes>) {
                       pull<kBytes, decltype(rows)::value>(member, group);
                     } else {
                       pull<sizeof(T), decltype(rows)::value>(member, group);
                     }
                   });
  }

  template <int kBytes, int kRows>
  PREPARED_HD void pull(int64_t member, int64_t group) const {
    using V = Vector<T, kBytes>;
    const RowGroups& layout = args.layout;
    const int64_t n = layout.size, step = layout.member_stride * n;
    const int64_t first = layout.row(group, member);
    const T* const rows = args.rows + first * n;
    T* const out = args.out_rows + first * n;
    const T* near[4];
    for (int k = 0; k < 4; ++k) near[k] = args.coefficients[k] + group * n;
    V sums[kRows] = {};
    over_columns<T, kBytes>(n, [&](int64_t j, auto overlaps) PREPARED_INLINE {
      const V ls = load<T, kBytes>(near[0] + j), lo = load<T, kBytes>(near[1] + j);
      const V us = load<T, kBytes>(near[2] + j), uo = load<T, kBytes>(near[3] + j);
      for (int q = 0; q < kRows; ++q) {
        const V r = load<T, kBytes>(rows + q * step + j);
        store<T, kBytes>(out + q * step + j, r * (r >= 0 ? ls : us));
        V term = r * (r >= 0 ? lo : uo);
        if (overlaps) term = drop_first<T, kBytes>(term, lanes<T, kBytes> - n % lanes<T, kBytes>);
        sums[q] += term;
      }
    });
    for (int q = 0; q < kRows; ++q) {
      args.bias[first + q * layout.member_stride] = sum_lanes<T, kBytes>(sums[q]);
    }
  }
};

// Columns of one tile of the gradient: the tile's sums stay in the first cache level.
constexpr int64_t kColumns = 512;

// Some rows of the gradient of the rows, `step` numbers apart; adds their share of the
// coefficients' to running sums.
template <int kRows, class T>
PREPARED_HD void push_rows(const T* __restrict grad_rows, const T (&grad_bias)[kRows],
                           const T* __restrict rows, int64_t step,
                           const T* const (&coefficients)[4], T* __restrict out,
                           T (&sums)[4][kColumns], int64_t n) {
  const T* __restrict lower_slope = coefficients[0], * __restrict upper_slope = coefficients[2];
  const T* __restrict lower_offset = coefficients[1], * __restrict upper_offset = coefficients[3];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T ls = lower_slope[j], us = upper_slope[j], lo = lower_offset[j], uo = upper_offset[j];
    T total[4] = {sums[0][j], sums[1][j], sums[2][j], sums[3][j]};
#pragma GCC unroll 4
    for (int q = 0; q < kRows; ++q) {
      const T r = rows[q * step + j], grad = grad_rows[q * step + j];
      const bool positive = r >= T(0);
      out[q * step + j] = grad * (positive ? ls : us) + grad_bias[q] * (positive ? lo : uo);
      const T to_slope = r * grad, to_offset = r * grad_bias[q];
      total[0] += positive ? to_slope : T(0);
      total[1] += positive ? to_offset : T(0);
      total[2] += positive ? T(0) : to_slope;
      total[3] += positive ? T(0) : to_offset;
    }
    for (int k = 0; k < 4; ++k) sums[k][j] = total[k];
  }
}

// Item i is one tile of columns of one piece of one group.
template <class T>
PREPARED_HD void push_tiles(const RelaxedBackwardGradArgs<T>& args, int64_t begin, int64_t end) {
  const RowGroups& layout = args.layout;
  const int64_t n = layout.size, tiles = (n + kColumns - 1) / kColumns;
  const int64_t per_piece = (layout.members + args.pieces - 1) / args.pieces;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = i % tiles * kColumns, width = std::min(kColumns, n - column);
    const int64_t g = i / tiles % layout.groups, piece = i / tiles / layout.groups;
    const T* coefficients[4];
    for (int k = 0; k < 4; ++k) coefficients[k] = args.coefficients[k] + g * n + column;
    T sums[4][kColumns];
    for (int k = 0; k < 4; ++k) std::fill(sums[k], sums[k] + width, T(0));
    const int64_t last = std::min(layout.members, (piece + 1) * per_piece);
    int64_t m = piece * per_piece;
    const auto push_block = [&](auto count) PREPARED_INLINE {
      constexpr int kRows = decltype(count)::value;
      const int64_t row = layout.row(g, m), at = row * n + column;
      T grad_bias[kRows];
      for (int q = 0; q < kRows; ++q) grad_bias[q] = args.grad_bias[row + q * layout.member_stride];
      push_rows<kRows>(args.grad_rows + at, grad_bias, args.rows + at, layout.member_stride * n,
                       coefficients, args.out_rows + at, sums, width);
      m += kRows;
    };
    while (m + kTogether <= last) push_block(std::integral_constant<int, kTogether>());
    while (m < last) push_block(std::integral_constant<int, 1>());
    for (int k = 0; k < 4; ++k) {
      T* out = args.partial + ((piece * 4 + k) * layout.groups + g) * n + column;
      std::copy(sums[k], sums[k] + width, out);
    }
  }
}

PREPARED_CLONES void push(const RelaxedBackwardGradArgs<float>& args, int64_t begin, int64_t end) {
  push_tiles(args, begin, end);
}

PREPARED_CLONES void push(const RelaxedBackwardGradArgs<double>& args, int64_t begin, int64_t end) {
  push_tiles(args, begin, end);
}

template <class T>
void pull_all(const RelaxedBackwardArgs<T>& args) {
  with_vectors([&](auto width) {
    constexpr int kBytes = decltype(width)::value;
    parallel_over(args.layout.rows(), args.layout.size, [&](int64_t begin, int64_t end) {
      run_job<kBytes>(PullJob<T>{args, begin, end});
    });
  });
}

template <class T>
void push_all(const RelaxedBackwardGradArgs<T>& args) {
  const RowGroups& layout = args.layout;
  const int64_t tiles = (layout.size + kColumns - 1) / kColumns;
  const int64_t items = tiles * layout.groups * args.pieces;
  parallel_over(items, layout.rows() * layout.size / items,
                [&](int64_t begin, int64_t end) { push(args, begin, end); });
}

}  // namespace

void launch_relaxed_backward(const RelaxedBackwardArgs<float>& args, CpuContext) { pull_all(args); }
void launch_relaxed_backward(const RelaxedBackwardArgs<double>& args, CpuContext) {
  pull_all(args);
}
void launch_relaxed_backward_grad(const RelaxedBackwardGradArgs<float>& args, CpuContext) {
  push_all(args);
}
void launch_relaxed_backward_grad(const RelaxedBackwardGradArgs<double>& args, CpuContext) {
  push_all(args);
}

}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CPU, m) {
  m.impl("relaxed_backward",
         TORCH_BOX(&torch_prepared::relaxed_backward<torch_prepared::CpuBackend>));
  m.impl("relaxed_backward_grad",
         TORCH_BOX(&torch_prepared::relaxed_backward_grad<torch_prepared::CpuBackend>));
}
