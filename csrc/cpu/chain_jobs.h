// The boxes of a chain shared among threads, for both operators on chains.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "chain_workspace.h"
#include "vector_jobs.h"

namespace torch_prepared {

// Boxes begin .. end - 1, one after another in one Leaf's memory.
template <template <class, int> class Leaf, class T, class Args>
struct ChainJob {
  const Args& args;
  PackedMaps<T>& packed;
  int64_t begin, end;

  template <int kBytes>
  PREPARED_HD void run() const {
    Leaf<T, kBytes> leaf(args, packed);
    for (int64_t i = begin; i < end; ++i) leaf.run(i);
  }
};

// Runs Leaf<T, kBytes> on every box of `chain`, in pieces of at least `each` boxes.
template <template <class, int> class Leaf, class T, class Args>
void run_chain(const Args& args, const ChainBoundsArgs<T>& chain, int64_t each) {
  with_vectors([&](auto width) {
    constexpr int kBytes = decltype(width)::value;
    PackedMaps<T> packed = pack_maps<T, kBytes>(chain.maps);
    torch::stable::parallel_for(0, chain.boxes, each, [&](int64_t begin, int64_t end) {
      run_job<kBytes>(ChainJob<Leaf, T, Args>{args, packed, begin, end});
    });
  });
}

}  // namespace torch_prepared
