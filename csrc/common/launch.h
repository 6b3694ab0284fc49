// Grid helpers of the CUDA launchers; needs the CUDA runtime only, no torch header.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "context.h"

namespace torch_prepared {

inline cudaStream_t stream_of(CudaContext context) {
  return static_cast<cudaStream_t>(context.stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) +
                             ": CUDA launch failed: " + cudaGetErrorString(error));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a grid-stride loop: enough for every multiprocessor, bounded for any 64-bit size.
inline unsigned grid_size(int64_t blocks) {
  constexpr int64_t kLimit = 1 << 20;
  return static_cast<unsigned>(blocks < kLimit ? (blocks > 0 ? blocks : 1) : kLimit);
}

// Kernels with fewer blocks than this leave multiprocessors idle.
constexpr int64_t kFullGrid = 512;

// N numbers moved by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <class T>
constexpr int kWide = 16 / sizeof(T);

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, class... Pointers>
bool can_pack(int64_t size, const Pointers*... pointers) {
  return size % kWide<T> == 0 && (aligned(pointers) && ...);
}

}  // namespace torch_prepared
