// CUDA kernels of relaxed_backward and its gradient.
#include "../ops/relaxed_backward.h"

#include "row_tile.cuh"

namespace torch_prepared {
namespace {

template <class T>
struct Pull {
  static constexpr int kCoefficients = 4;
  static constexpr bool kWrites = true;
  __device__ __forceinline__ static T apply(T r, const T* c, T* out) {
    const bool positive = r >= T(0);
    *out = r * (positive ? c[0] : c[2]);
    return r * (positive ? c[1] : c[3]);
  }
};

template <class T>
void pull(const RelaxedBackwardArgs<T>& args, CudaContext context) {
  RowTileArgs<T, Pull<T>> tile = {args.layout, args.rows, {}, args.out_rows, args.bias};
  for (int k = 0; k < 4; ++k) tile.coefficients[k] = args.coefficients[k];
  launch_rows(tile, context);
  check_launch("relaxed_backward");
}

// A thread owns WIDTH columns of one piece of one group: it walks down the piece's rows and keeps
// the four sums in registers, so nothing is added atomically and the result is reproducible.
template <class T, int WIDTH>
__global__ void __launch_bounds__(128)
    push_kernel(RelaxedBackwardGradArgs<T> args, int64_t columns, int64_t per_piece) {
  const RowGroups layout = args.layout;
  const int64_t n = layout.size, items = columns * layout.groups * args.pieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < items;
       i += step) {
    const int64_t column = i % columns * WIDTH, group = i / columns % layout.groups;
    const int64_t piece = i / columns / layout.groups;
    Pack<T, WIDTH> c[4], sums[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) c[k] = load<WIDTH>(args.coefficients[k] + group * n + column);
    const int64_t end = (piece + 1) * per_piece;
    const int64_t last = end < layout.members ? end : layout.members;
#pragma unroll 4
    for (int64_t m = piece * per_piece; m < last; ++m) {
      const int64_t row = layout.row(group, m), at = row * n + column;
      const Pack<T, WIDTH> r = load<WIDTH>(args.rows + at), grad = load<WIDTH>(args.grad_rows + at);
      const T grad_bias = args.grad_bias[row];
      Pack<T, WIDTH> out;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const bool positive = r.at[j] >= T(0);
        out.at[j] = grad.at[j] * (positive ? c[0].at[j] : c[2].at[j]) +
                    grad_bias * (positive ? c[1].at[j] : c[3].at[j]);
        const T to_slope = r.at[j] * grad.at[j], to_offset = r.at[j] * grad_bias;
        sums[0].at[j] += positive ? to_slope : T(0);
        sums[1].at[j] += positive ? to_offset : T(0);
        sums[2].at[j] += positive ? T(0) : to_slope;
        sums[3].at[j] += positive ? T(0) : to_offset;
      }
      store<WIDTH>(args.out_rows + at, out);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store<WIDTH>(args.partial + ((piece * 4 + k) * layout.groups + group) * n + column, sums[k]);
    }
  }
}

template <class T, int WIDTH>
void push_columns(const RelaxedBackwardGradArgs<T>& args, CudaContext context) {
  const int64_t columns = args.layout.size / WIDTH;
  const int64_t per_piece = ceil_div(args.layout.members, args.pieces);
  const unsigned grid = grid_size(ceil_div(columns * args.layout.groups * args.pieces, 128));
  push_kernel<T, WIDTH><<<grid, 128, 0, stream_of(context)>>>(args, columns, per_piece);
  check_launch("relaxed_backward_grad");
}

template <class T>
void push(const RelaxedBackwardGradArgs<T>& args, CudaContext context) {
  const T* const* c = args.coefficients;
  if (can_pack<T>(args.layout.size, args.rows, args.grad_rows, args.out_rows, args.partial, c[0],
                  c[1], c[2], c[3])) {
    push_columns<T, kWide<T>>(args, context);
  } else {
    push_columns<T, 1>(args, context);
  }
}

}  // namespace

void launch_relaxed_backward(const RelaxedBackwardArgs<float>& args, CudaContext context) {
  pull(args, context);
}
void launch_relaxed_backward(const RelaxedBackwardArgs<double>& args, CudaContext context) {
  pull(args, context);
}
void launch_relaxed_backward_grad(const RelaxedBackwardGradArgs<float>& args, CudaContext context) {
  push(args, context);
}
void launch_relaxed_backward_grad(const RelaxedBackwardGradArgs<double>& args,
                                  CudaContext context) {
  push(args, context);
}

}  // namespace torch_prepared
