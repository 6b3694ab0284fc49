// concretize: arguments and launchers.
#pragma once

#include "../common/context.h"
#include "../common/row_groups.h"

namespace torch_prepared {

template <class T>
struct ConcretizeArgs {
  RowGroups layout;
  const T* rows;
  const T* center;
  const T* radius;
  T* out;  // (rows,)
};

void launch_concretize(const ConcretizeArgs<float>&, CpuContext);
void launch_concretize(const ConcretizeArgs<double>&, CpuContext);
void launch_concretize(const ConcretizeArgs<float>&, CudaContext);
void launch_concretize(const ConcretizeArgs<double>&, CudaContext);

}  // namespace torch_prepared
