// CPU kernel of chain_bounds: boxes are shared among threads, each bounded by one core on its own.
#include "../wrappers/chain_bounds.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "chain_jobs.h"
#include "chain_leaf.h"

namespace torch_prepared {
namespace {

// Boxes of one piece of work: enough to outweigh the allocation of a thread's memory.
constexpr int64_t kBoxes = 32;

}  // namespace

void launch_chain_bounds(const ChainBoundsArgs<float>& args, CpuContext) {
  run_chain<Leaf>(args, args, kBoxes);
}
void launch_chain_bounds(const ChainBoundsArgs<double>& args, CpuContext) {
  run_chain<Leaf>(args, args, kBoxes);
}

}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CPU, m) {
  m.impl("chain_bounds", TORCH_BOX(&torch_prepared::chain_bounds<torch_prepared::CpuBackend>));
}
