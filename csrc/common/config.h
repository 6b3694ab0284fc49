// Compiler portability: host/device qualifier and runtime dispatch over instruction sets.
#pragma once

#ifdef __CUDACC__
#define PREPARED_HD __host__ __device__ __forceinline__
#else
#define PREPARED_HD inline __attribute__((always_inline))
#endif

// Placed on the loops of the CPU kernels: one clone per instruction set, chosen when the library
// is loaded, so that a single binary is fast on new processors and runs on old ones.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define PREPARED_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PREPARED_CLONES
#endif
