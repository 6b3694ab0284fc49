// relaxed_backward and its gradient: arguments, launchers and the tensor wrappers.
#pragma once

#include "../common/context.h"
#include "../common/row_groups.h"

namespace torch_prepared {

// Coefficients in the order lower_slope, lower_offset, upper_slope, upper_offset.
template <class T>
struct RelaxedBackwardArgs {
  RowGroups layout;
  const T* rows;
  const T* coefficients[4];
  T* out_rows;  // (rows, n)
  T* bias;      // (rows,)
};

template <class T>
struct RelaxedBackwardGradArgs {
  RowGroups layout;
  const T* grad_rows;
  const T* grad_bias;
  const T* rows;
  const T* coefficients[4];
  T* out_rows;     // (rows, n)
  T* partial;      // (pieces, 4, groups, n), order of `coefficients`
  int64_t pieces;  // pieces of each group's members
};

#define PREPARED_DECLARE(T, Context)                                    \
  void launch_relaxed_backward(const RelaxedBackwardArgs<T>&, Context); \
  void launch_relaxed_backward_grad(const RelaxedBackwardGradArgs<T>&, Context)
PREPARED_DECLARE(float, CpuContext);
PREPARED_DECLARE(double, CpuContext);
PREPARED_DECLARE(float, CudaContext);
PREPARED_DECLARE(double, CudaContext);
#undef PREPARED_DECLARE

constexpr int64_t kRowsPerPiece = 64;

}  // namespace torch_prepared
