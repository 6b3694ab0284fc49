// CUDA kernel of concretize.
#include "../ops/concretize.h"

#include "row_tile.cuh"

namespace torch_prepared {
namespace {

template <class T>
struct Support {
  static constexpr int kCoefficients = 2;
  static constexpr bool kWrites = false;
  __device__ __forceinline__ static T apply(T r, const T* c, T*) {
    return r * c[0] - (r < T(0) ? -r : r) * c[1];
  }
};

template <class T>
void run(const ConcretizeArgs<T>& args, CudaContext context) {
  const RowTileArgs<T, Support<T>> tile = {
      args.layout, args.rows, {args.center, args.radius}, nullptr, args.out};
  launch_rows(tile, context);
  check_launch("concretize");
}

}  // namespace

void launch_concretize(const ConcretizeArgs<float>& args, CudaContext context) {
  run(args, context);
}
void launch_concretize(const ConcretizeArgs<double>& args, CudaContext context) {
  run(args, context);
}

}  // namespace torch_prepared
