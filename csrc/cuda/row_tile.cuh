// One kernel shape for everything that reads rows (rows, n) once and sums along them.
//
// A team of threads (a warp for short rows, a block for long ones) takes a tile of rows that share
// their coefficients. It walks over the columns; at each step a thread loads its coefficients
// once, then the same columns of every row of the tile: 16-byte loads, all of them in flight
// together. So coefficients are read once per tile instead of once per row.
//
// An Op has `kCoefficients`, `kWrites` and
//     __device__ static T apply(T r, const T* c, T* out)   returning the term of the row's sum.
#pragma once

#include "../common/launch.h"
#include "../common/row_groups.h"

namespace torch_prepared {

constexpr int kWarp = 32;
constexpr int kBlock = 256;

template <class T, class Op>
struct RowTileArgs {
  RowGroups layout;
  const T* rows;
  const T* coefficients[Op::kCoefficients];
  T* out_rows;  // null unless Op::kWrites
  T* sums;
};

template <class T>
__device__ __forceinline__ T sum_warp(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, step);
  }
  return value;
}

// Sum over a team of TEAM threads, valid in its first thread.
template <int TEAM, class T>
__device__ __forceinline__ T sum_team(T value, T* scratch) {
  value = sum_warp(value);
  if constexpr (TEAM == kWarp) return value;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) value = sum_warp(lane < TEAM / kWarp ? scratch[lane] : T(0));
  return value;
}

template <class T, class Op, int TEAM, int WIDTH, int ROWS>
__global__ void __launch_bounds__(kBlock) row_tile_kernel(RowTileArgs<T, Op> args, int64_t tiles) {
  constexpr int kTeams = kBlock / TEAM;
  __shared__ T scratch[kBlock / kWarp];
  const int rank = threadIdx.x % TEAM;
  const RowGroups layout = args.layout;
  const int64_t n = layout.size, per_group = (layout.members + ROWS - 1) / ROWS;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / TEAM;
  for (int64_t tile = first; tile < tiles; tile += static_cast<int64_t>(gridDim.x) * kTeams) {
    const int64_t group = tile / per_group, member = tile % per_group * ROWS;
    const int64_t left = layout.members - member;
    const int count = left < ROWS ? static_cast<int>(left) : ROWS;
    const int64_t row = layout.row(group, member), stride = layout.member_stride * n;
    T sums[ROWS] = {};
    for (int64_t column = rank * WIDTH; column < n; column += TEAM * WIDTH) {
      Pack<T, WIDTH> coefficients[Op::kCoefficients], in[ROWS];
#pragma unroll
      for (int k = 0; k < ROWS; ++k) {
        if (k < count) in[k] = load<WIDTH>(args.rows + row * n + k * stride + column);
      }
#pragma unroll
      for (int k = 0; k < Op::kCoefficients; ++k) {
        coefficients[k] = load<WIDTH>(args.coefficients[k] + group * n + column);
      }
#pragma unroll
      for (int k = 0; k < ROWS; ++k) {
        if (k >= count) continue;
        Pack<T, WIDTH> out;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
          T c[Op::kCoefficients];
#pragma unroll
          for (int i = 0; i < Op::kCoefficients; ++i) c[i] = coefficients[i].at[j];
          sums[k] += Op::apply(in[k].at[j], c, &out.at[j]);
        }
        if constexpr (Op::kWrites) {
          store<WIDTH>(args.out_rows + row * n + k * stride + column, out);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const T total = sum_team<TEAM>(sums[k], scratch);
      if (rank == 0 && k < count) args.sums[row + k * layout.member_stride] = total;
    }
  }
}

template <class T, class Op, int TEAM, int WIDTH, int ROWS>
void launch_tiles(const RowTileArgs<T, Op>& args, cudaStream_t stream) {
  const int64_t tiles = args.layout.groups * ceil_div(args.layout.members, ROWS);
  const unsigned grid = grid_size(ceil_div(tiles, kBlock / TEAM));
  row_tile_kernel<T, Op, TEAM, WIDTH, ROWS><<<grid, kBlock, 0, stream>>>(args, tiles);
}

// Many rows a tile save coefficient reads; few keep all multiprocessors busy on small problems.
template <class T, class Op, int TEAM, int WIDTH>
void launch_team(const RowTileArgs<T, Op>& args, cudaStream_t stream) {
  constexpr int kMany = 8;
  const int64_t teams = args.layout.groups * ceil_div(args.layout.members, kMany);
  const bool busy = teams >= kFullGrid * (kBlock / TEAM);
  if (args.layout.members >= kMany / 2 && busy) {
    launch_tiles<T, Op, TEAM, WIDTH, kMany>(args, stream);
  } else {
    launch_tiles<T, Op, TEAM, WIDTH, 1>(args, stream);
  }
}

template <class T, class Op, int WIDTH>
void launch_width(const RowTileArgs<T, Op>& args, cudaStream_t stream) {
  if (args.layout.size <= 8 * kWarp * WIDTH) {
    launch_team<T, Op, kWarp, WIDTH>(args, stream);
  } else {
    launch_team<T, Op, kBlock, WIDTH>(args, stream);
  }
}

template <class T, class Op>
void launch_rows(const RowTileArgs<T, Op>& args, CudaContext context) {
  bool wide = can_pack<T>(args.layout.size, args.rows, args.out_rows);
  for (const T* coefficients : args.coefficients) wide = wide && aligned(coefficients);
  if (wide) {
    launch_width<T, Op, kWide<T>>(args, stream_of(context));
  } else {
    launch_width<T, Op, 1>(args, stream_of(context));
  }
}

}  // namespace torch_prepared
