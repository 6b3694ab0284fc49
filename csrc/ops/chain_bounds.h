// chain_bounds: arguments and launchers.
#pragma once

#include <stdint.h>

#include <vector>

#include "../common/context.h"

namespace torch_prepared {

// One affine map of the chain: weight (out, in) row-major, bias (out,).
template <class T>
struct ChainMap {
  int64_t in, out;
  const T* weight;
  const T* bias;
};

// Every map but the last is followed by max(x, 0); `hidden` counts the scalars of all of those.
template <class T>
struct ChainBoundsArgs {
  std::vector<ChainMap<T>> maps;
  int64_t boxes, hidden, count;  // count: rows of each box
  int64_t row_stride;            // numbers between the rows of two boxes; 0 when they share them
  const T* lower;                // (boxes, inputs)
  const T* upper;
  const T* rows;         // (count, outputs) per box
  const T* known_lower;  // (boxes, hidden), or null
  const T* known_upper;
  T* values;        // (boxes, count)
  T* input_rows;    // (boxes, count, inputs)
  T* hidden_lower;  // (boxes, hidden)
  T* hidden_upper;
};

void launch_chain_bounds(const ChainBoundsArgs<float>&, CpuContext);
void launch_chain_bounds(const ChainBoundsArgs<double>&, CpuContext);

}  // namespace torch_prepared
