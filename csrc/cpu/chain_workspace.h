// Memory of the chain engine: what all boxes share, and what one thread reuses box after box.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../ops/chain_bounds.h"
#include "panel.h"

namespace torch_prepared {

// Rows of a backward pass run through the caches in panels of at most this many.
constexpr int64_t kPanelRows = 64;

// Zeros, aligned to the longest vectors.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : memory_(static_cast<size_t>(count + kSlack), T(0)) {}
  T* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (64 - address % 64) % 64 / sizeof(T);
  }

 private:
  static constexpr int64_t kSlack = 64 / sizeof(T);
  std::vector<T> memory_;
};

// One map as interval arithmetic reads it: (in, stride) transposed, and its magnitudes.
template <class T>
struct PackedMap {
  Buffer<T> weight, magnitude, bias;
  int64_t stride;
};

template <class T>
struct PackedMaps {
  std::vector<PackedMap<T>> maps;
  bool finite = true;  // otherwise no bound holds
};

template <class T, int kBytes>
PackedMaps<T> pack_maps(const std::vector<ChainMap<T>>& maps) {
  PackedMaps<T> packed;
  for (const ChainMap<T>& map : maps) {
    const int64_t stride = padded<T, kBytes>(map.out);
    PackedMap<T> into = {Buffer<T>(map.in * stride), Buffer<T>(map.in * stride), Buffer<T>(stride),
                         stride};
    for (int64_t i = 0; i < map.out; ++i) {
      for (int64_t j = 0; j < map.in; ++j) {
        const T weight = map.weight[i * map.in + j];
        packed.finite &= std::isfinite(weight);
        into.weight.data()[j * stride + i] = weight;
        into.magnitude.data()[j * stride + i] = std::abs(weight);
      }
      packed.finite &= std::isfinite(map.bias[i]);
      into.bias.data()[i] = map.bias[i];
    }
    packed.maps.push_back(std::move(into));
  }
  return packed;
}

// A linear function of each column's value v: the smaller, over lower[c] <= v <= upper[c], of
// coefficient * v. Also offsets of lines, and the bias column with both ends 1.
template <class T>
struct Ends {
  explicit Ends(int64_t stride) : lower_memory(stride), upper_memory(stride) {}
  Buffer<T> lower_memory, upper_memory;
  T* lower = lower_memory.data();
  T* upper = upper_memory.data();
};

// The input side of one map on the present box: the network's inputs or the neurons before it that
// are not zero on the whole box, then a column for the bias, then zeros up to the stride.
template <class T>
struct Side {
  Side(int64_t in, int64_t out, int64_t widest)
      : index(static_cast<size_t>(in)),
        slope(widest),
        offset(widest),
        before(widest),
        after(widest),
        middle_memory(2 * widest),
        matrix_memory(out * widest) {}
  Side(const Side&) = delete;

  Panel<T> matrix() { return {matrix_memory.data(), stride}; }

  int64_t count = 0, stride = 0;
  std::vector<int32_t> index;  // the neurons of the columns
  Ends<T> slope, offset;       // lines of the activation; for inputs the box is the offset
  Ends<T> before, after;       // boxes before and after the activation
  Buffer<T> middle_memory;     // centers of `after`, then radii, without gaps
  Buffer<T> matrix_memory;     // the map's compact matrix
};

}  // namespace torch_prepared
