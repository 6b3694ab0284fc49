// CUDA passes of interval_linear around the library's matrix products.
#include "../ops/interval_linear.h"

#include "../common/launch.h"

namespace torch_prepared {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ __forceinline__ void apply(const SplitIntervalArgs<T>& args, int64_t i) {
  split_interval(args, i);
}

template <class T>
__device__ __forceinline__ void apply(const SplitWeightArgs<T>& args, int64_t i) {
  split_weight(args, i);
}

template <class T>
__device__ __forceinline__ void apply(const JoinIntervalArgs<T>& args, int64_t i) {
  join_interval(args, i, i % args.columns);
}

template <class Args>
__global__ void __launch_bounds__(kThreads) pass_kernel(Args args) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count;
       i += step) {
    apply(args, i);
  }
}

template <class Args>
void run(const Args& args, CudaContext context) {
  const unsigned grid = grid_size(ceil_div(args.count, kThreads));
  pass_kernel<<<grid, kThreads, 0, stream_of(context)>>>(args);
  check_launch("interval_linear");
}

}  // namespace

void launch_split_interval(const SplitIntervalArgs<float>& args, CudaContext c) { run(args, c); }
void launch_split_interval(const SplitIntervalArgs<double>& args, CudaContext c) { run(args, c); }
void launch_split_weight(const SplitWeightArgs<float>& args, CudaContext c) { run(args, c); }
void launch_split_weight(const SplitWeightArgs<double>& args, CudaContext c) { run(args, c); }
void launch_join_interval(const JoinIntervalArgs<float>& args, CudaContext c) { run(args, c); }
void launch_join_interval(const JoinIntervalArgs<double>& args, CudaContext c) { run(args, c); }

}  // namespace torch_prepared
