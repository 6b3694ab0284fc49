// CUDA kernels of activation_coefficients and its gradient.
#include "../ops/activation_coefficients.h"

#include "../common/launch.h"

namespace torch_prepared {
namespace {

constexpr int kThreads = 128;

// Pairs of loads and stores of one warp are contiguous; WIDTH strips per thread keep several in
// flight.
template <class T, class Rule>
__global__ void __launch_bounds__(kThreads)
    coefficients_kernel(Rule rule, CoefficientArgs<T> args) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t errors = 0;
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count;
       i += step) {
    errors += write_coefficients(rule, args, i);
  }
  if (errors > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(args.errors),
              static_cast<unsigned long long>(errors));
  }
}

// Piecewise-linear kinds are bound by memory: 16-byte loads and stores.
template <class T>
__global__ void __launch_bounds__(kThreads) leaky_kernel(LeakyRule rule, CoefficientArgs<T> args) {
  constexpr int kWidth = kWide<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kWidth;
  int64_t errors = 0;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
       i < args.count; i += step) {
    const Pack<T, kWidth> l = load<kWidth>(args.lower + i), u = load<kWidth>(args.upper + i);
    Pack<T, kWidth> a = {};
    if (args.alpha != nullptr) a = load<kWidth>(args.alpha + i);
    Pack<T, kWidth> out[4];
    CoefficientArgs<T> local = args;
    local.lower = l.at;
    local.upper = u.at;
    local.alpha = args.alpha != nullptr ? a.at : nullptr;
    for (int k = 0; k < 4; ++k) local.out[k] = out[k].at;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) errors += write_coefficients(rule, local, j);
#pragma unroll
    for (int k = 0; k < 4; ++k) store<kWidth>(args.out[k] + i, out[k]);
  }
  if (errors > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(args.errors),
              static_cast<unsigned long long>(errors));
  }
}

template <class T, class Rule>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Rule rule, CoefficientGradArgs<T> args) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count;
       i += step) {
    write_gradient(rule, args, i);
  }
}

template <class T, class Rule>
void launch_rule(const Rule& rule, const CoefficientArgs<T>& args, cudaStream_t stream) {
  const unsigned grid = grid_size(ceil_div(args.count, kThreads));
  coefficients_kernel<T, Rule><<<grid, kThreads, 0, stream>>>(rule, args);
}

template <class T>
void launch_rule(const LeakyRule& rule, const CoefficientArgs<T>& args, cudaStream_t stream) {
  T* const* out = args.out;
  if (!can_pack<T>(args.count, args.lower, args.upper, args.alpha, out[0], out[1], out[2],
                   out[3])) {
    return launch_rule<T, LeakyRule>(rule, args, stream);
  }
  const unsigned grid = grid_size(ceil_div(args.count, kThreads * kWide<T>));
  leaky_kernel<T><<<grid, kThreads, 0, stream>>>(rule, args);
}

template <class T>
void run(const CoefficientArgs<T>& args, CudaContext context) {
  with_rule(args, [&](const auto& rule) { launch_rule(rule, args, stream_of(context)); });
  check_launch("activation_coefficients");
}

template <class T>
void run_gradient(const CoefficientGradArgs<T>& args, CudaContext context) {
  const unsigned grid = grid_size(ceil_div(args.count, kThreads));
  with_rule(args, [&](const auto& rule) {
    using Rule = std::decay_t<decltype(rule)>;
    gradient_kernel<T, Rule><<<grid, kThreads, 0, stream_of(context)>>>(rule, args);
  });
  check_launch("activation_coefficients_grad");
}

}  // namespace

void launch_activation_coefficients(const CoefficientArgs<float>& args, CudaContext context) {
  run(args, context);
}
void launch_activation_coefficients(const CoefficientArgs<double>& args, CudaContext context) {
  run(args, context);
}
void launch_activation_coefficients_grad(const CoefficientGradArgs<float>& args,
                                         CudaContext context) {
  run_gradient(args, context);
}
void launch_activation_coefficients_grad(const CoefficientGradArgs<double>& args,
                                         CudaContext context) {
  run_gradient(args, context);
}

}  // namespace torch_prepared
