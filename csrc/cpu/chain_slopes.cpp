// CPU kernel of chain_slopes: boxes are shared among threads, each searched by one core on its own.
#include "../wrappers/chain_slopes.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "chain_jobs.h"
#include "chain_slopes.h"

namespace torch_prepared {
namespace {

constexpr int64_t kBoxes = 16;  // of one piece of work

}  // namespace

void launch_chain_slopes(const ChainSlopesArgs<float>& args, CpuContext) {
  run_chain<SlopeLeaf>(args, args.bounds, kBoxes);
}
void launch_chain_slopes(const ChainSlopesArgs<double>& args, CpuContext) {
  run_chain<SlopeLeaf>(args, args.bounds, kBoxes);
}

}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CPU, m) {
  m.impl("chain_slopes", TORCH_BOX(&torch_prepared::chain_slopes<torch_prepared::CpuBackend>));
}
