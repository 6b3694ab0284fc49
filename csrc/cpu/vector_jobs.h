// Runs one piece of work on the widest vectors of the processor that it meets at run time.
//
// A job is a struct with a member `template <int kBytes> void run() const`, always inlined, which
// works on vectors of kBytes bytes. It is compiled once per instruction set, with all it inlines.
// Products and sums fuse: results are rounded to nearest; nothing may rely on directed rounding.
#pragma once

#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#define PREPARED_X86 1
#define PREPARED_TARGET(name) __attribute__((target(name), optimize("fp-contract=fast")))
#endif

namespace torch_prepared {

#ifdef PREPARED_X86
template <class Job>
PREPARED_TARGET("avx512f,avx512dq,avx512vl")
void run_512(const Job& job) {
  job.template run<64>();
}
template <class Job>
PREPARED_TARGET("avx2,fma")
void run_256(const Job& job) {
  job.template run<32>();
}
#endif
template <class Job>
void run_128(const Job& job) {
  job.template run<16>();
}

// Calls f(width) with the width of the processor's vectors in bytes, an integral_constant.
template <class F>
void with_vectors(const F& f) {
#ifdef PREPARED_X86
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return f(std::integral_constant<int, 64>());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return f(std::integral_constant<int, 32>());
  }
#endif
  f(std::integral_constant<int, 16>());
}

// Runs a job on vectors of kBytes, which is what with_vectors found.
template <int kBytes, class Job>
void run_job(const Job& job) {
#ifdef PREPARED_X86
  if constexpr (kBytes == 64) return run_512(job);
  if constexpr (kBytes == 32) return run_256(job);
#endif
  if constexpr (kBytes == 16) run_128(job);
}

}  // namespace torch_prepared
