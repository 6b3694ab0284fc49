// CPU kernel of chain_slopes: boxes are shared among threads, each searched by one core on its own.
#include "../wrappers/chain_slopes.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "chain_slopes.h"

// A function compiled for one instruction set; all it calls is inlined.
#if defined(__x86_64__) && defined(__GNUC__)
#define PREPARED_X86 1
#define PREPARED_TARGET(name) __attribute__((target(name), optimize("fp-contract=fast")))
#endif

namespace torch_prepared {
namespace {

constexpr int64_t kBoxes = 16;  // of one piece of work

template <class T>
struct Job {
  const ChainSlopesArgs<T>& args;
  PackedMaps<T>& packed;
  int64_t begin, end;
};

template <class T, int kBytes>
PREPARED_HD void run_boxes(const Job<T>& job) {
  SlopeLeaf<T, kBytes> leaf(job.args, job.packed);
  for (int64_t i = job.begin; i < job.end; ++i) leaf.run(i);
}

#ifdef PREPARED_X86
PREPARED_TARGET("avx512f,avx512dq,avx512vl") void run_512(const Job<float>& job) {
  run_boxes<float, 64>(job);
}
PREPARED_TARGET("avx512f,avx512dq,avx512vl") void run_512(const Job<double>& job) {
  run_boxes<double, 64>(job);
}
PREPARED_TARGET("avx2,fma") void run_256(const Job<float>& job) { run_boxes<float, 32>(job); }
PREPARED_TARGET("avx2,fma") void run_256(const Job<double>& job) { run_boxes<double, 32>(job); }
#endif
void run_128(const Job<float>& job) { run_boxes<float, 16>(job); }
void run_128(const Job<double>& job) { run_boxes<double, 16>(job); }

template <int kBytes, class T, class Run>
void run_all(const ChainSlopesArgs<T>& args, const Run& run) {
  PackedMaps<T> packed = pack_maps<T, kBytes>(args.bounds.maps);
  torch::stable::parallel_for(0, args.bounds.boxes, kBoxes, [&](int64_t begin, int64_t end) {
    run(Job<T>{args, packed, begin, end});
  });
}

template <class T>
void dispatch(const ChainSlopesArgs<T>& args) {
#ifdef PREPARED_X86
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return run_all<64>(args, [](const Job<T>& job) { run_512(job); });
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return run_all<32>(args, [](const Job<T>& job) { run_256(job); });
  }
#endif
  run_all<16>(args, [](const Job<T>& job) { run_128(job); });
}

}  // namespace

void launch_chain_slopes(const ChainSlopesArgs<float>& args, CpuContext) { dispatch(args); }
void launch_chain_slopes(const ChainSlopesArgs<double>& args, CpuContext) { dispatch(args); }

}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CPU, m) {
  m.impl("chain_slopes", TORCH_BOX(&torch_prepared::chain_slopes<torch_prepared::CpuBackend>));
}
