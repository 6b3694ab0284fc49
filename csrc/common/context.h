// Where a launcher runs. Overloads of launch_* on these types are the only backend dispatch.
#pragma once

namespace torch_prepared {

struct CpuContext {};

// The stream is a cudaStream_t, kept untyped so that host-only files need no CUDA header.
struct CudaContext {
  void* stream;
};

}  // namespace torch_prepared
