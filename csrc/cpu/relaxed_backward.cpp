// CPU kernels of relaxed_backward and its gradient.
#include "../wrappers/relaxed_backward.h"

#include <algorithm>

#include "../common/config.h"
#include "backend.h"

namespace torch_prepared {
namespace {

// One row: out = r * (r >= 0 ? lower_slope : upper_slope); returns the bias.
template <class T>
PREPARED_HD T pull_row(const T* __restrict rows, const T* const (&coefficients)[4], int64_t at,
                       T* __restrict out, int64_t n) {
  const T* __restrict lower_slope = coefficients[0] + at, * __restrict upper_slope =
                                                              coefficients[2] + at;
  const T* __restrict lower_offset = coefficients[1] + at, * __restrict upper_offset =
                                                               coefficients[3] + at;
  T bias = T(0);
#pragma omp simd reduction(+ : bias)
  for (int64_t j = 0; j < n; ++j) {
    const T r = rows[j];
    const T ls = lower_slope[j], us = upper_slope[j], lo = lower_offset[j], uo = upper_offset[j];
    const bool positive = r >= T(0);
    out[j] = r * (positive ? ls : us);
    bias += r * (positive ? lo : uo);
  }
  return bias;
}

template <class T>
PREPARED_HD void pull_rows(const RelaxedBackwardArgs<T>& args, int64_t begin, int64_t end) {
  const RowGroups& layout = args.layout;
  const int64_t n = layout.size;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t g = i / layout.members, row = layout.row(g, i % layout.members);
    args.bias[row] =
        pull_row(args.rows + row * n, args.coefficients, g * n, args.out_rows + row * n, n);
  }
}

PREPARED_CLONES void pull(const RelaxedBackwardArgs<float>& args, int64_t begin, int64_t end) {
  pull_rows(args, begin, end);
}

PREPARED_CLONES void pull(const RelaxedBackwardArgs<double>& args, int64_t begin, int64_t end) {
  pull_rows(args, begin, end);
}

// Columns of one tile of the gradient: the tile's sums stay in the first cache level.
constexpr int64_t kColumns = 512;

// One row of the gradient of the rows; adds its share of the coefficients' to running sums.
template <class T>
PREPARED_HD void push_row(const T* __restrict grad_rows, T grad_bias, const T* __restrict rows,
                          const T* const (&coefficients)[4], T* __restrict out,
                          T (&sums)[4][kColumns], int64_t n) {
  const T* __restrict lower_slope = coefficients[0], * __restrict upper_slope = coefficients[2];
  const T* __restrict lower_offset = coefficients[1], * __restrict upper_offset = coefficients[3];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T r = rows[j], grad = grad_rows[j];
    const T ls = lower_slope[j], us = upper_slope[j], lo = lower_offset[j], uo = upper_offset[j];
    const bool positive = r >= T(0);
    out[j] = grad * (positive ? ls : us) + grad_bias * (positive ? lo : uo);
    const T to_slope = r * grad, to_offset = r * grad_bias;
    sums[0][j] += positive ? to_slope : T(0);
    sums[1][j] += positive ? to_offset : T(0);
    sums[2][j] += positive ? T(0) : to_slope;
    sums[3][j] += positive ? T(0) : to_offset;
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
    for (int64_t m = piece * per_piece; m < last; ++m) {
      const int64_t row = layout.row(g, m), at = row * n + column;
      push_row(args.grad_rows + at, args.grad_bias[row], args.rows + at, coefficients,
               args.out_rows + at, sums, width);
    }
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
  parallel_over(args.layout.rows(), args.layout.size,
                [&](int64_t begin, int64_t end) { pull(args, begin, end); });
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
