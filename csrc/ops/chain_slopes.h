// chain_slopes: arguments and launchers.
#pragma once

#include <stdint.h>

#include "chain_bounds.h"

namespace torch_prepared {

// How the lower slopes of a box are optimized: steps of Adam.
struct SlopeSearch {
  int64_t iterations;
  double rate, decay;                // of the first step; factor after each step
  double momentum, square_momentum;  // what is kept of the moments at each step
  int64_t levels;                    // slopes are returned as multiples of its inverse
  int64_t patience;                  // steps after which a box must be more than half of the way
};

// `bounds` asks for the values and input rows of all output rows; its hidden intervals and known
// intervals are not used.
template <class T>
struct ChainSlopesArgs {
  ChainBoundsArgs<T> bounds;
  SlopeSearch search;
  const int64_t* row;  // (boxes,) the output row whose bound is to rise
  const T* enough;     // (boxes,) at which bound of that row a box needs no more steps
  const T* given;      // (boxes, hidden) slopes to start from; negative: the usual ones
  T* slopes;           // (boxes, hidden) the best met, multiples of 1 / levels
};

void launch_chain_slopes(const ChainSlopesArgs<float>&, CpuContext);
void launch_chain_slopes(const ChainSlopesArgs<double>&, CpuContext);

}  // namespace torch_prepared
