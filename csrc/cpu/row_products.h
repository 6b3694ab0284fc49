// Products of rows in lanes with the weights of linear and convolutional layers.
#pragma once

#include "row_lanes.h"

namespace torch_prepared {

// One source pixel that contributes to a target pixel.
template <class T>
struct Tap {
  const int32_t* entry;
  int64_t count, first;  // row of the weight for entry e is e - first
  const T* weight;
};

template <class T, int kBytes, int V>
class LaneProducts : public LaneRows<T, kBytes, V> {
  using Base = LaneRows<T, kBytes, V>;
  static constexpr int kBlock = kBytes == 64 ? 8 : 4;  // columns that fit the registers

 public:
  using Base::Base, Base::kRows;

 protected:
  using Base::args_, Base::lists_, Base::memory_, Base::windows_;
  using Base::kLane, Base::over_pixels, Base::slot, Base::value, Base::wanted, Base::written;
  using typename Base::Vec;

  PREPARED_HD void conv(const RowStep& step) {
    const RowSlot &from = args_.slots[step.source], &to = args_.slots[step.target];
    const Window window = windows_[step.source];
    const EntryLists have = lists_[step.source], want = wanted(step);
    const int64_t inner = to.channels / step.groups;
    const T* const weight = args_.tensors[step.data];  // (kernel, from channels, inner)
    taps_.resize(static_cast<size_t>(step.kernel[0] * step.kernel[1]));
    over_pixels(step.target, [&](int64_t y, int64_t x, int64_t q) PREPARED_INLINE {
      int64_t taps = 0;
      for (int64_t ky = 0; ky < step.kernel[0]; ++ky) {
        const int64_t py = y + step.padding[0] - ky * step.dilation[0];
        if (py < window.begin[0] * step.stride[0] || py % step.stride[0] != 0 ||
            py / step.stride[0] >= window.end[0]) {
          continue;
        }
        for (int64_t kx = 0; kx < step.kernel[1]; ++kx) {
          const int64_t px = x + step.padding[1] - kx * step.dilation[1];
          if (px < window.begin[1] * step.stride[1] || px % step.stride[1] != 0 ||
              px / step.stride[1] >= window.end[1]) {
            continue;
          }
          const int64_t p = py / step.stride[0] * from.width + px / step.stride[1];
          const int64_t begin = have.offset[p], count = have.offset[p + 1] - begin;
          if (count == 0) continue;
          const int64_t tap = (ky * step.kernel[1] + kx) * from.channels * inner;
          taps_[taps++] = {have.entry + begin, count, p * from.channels, weight + tap};
        }
      }
      const int32_t* const entry = want.entry + want.offset[q];
      const int64_t count = want.offset[q + 1] - want.offset[q];
      if (step.groups == 1) {
        columns(step, taps, entry, count, q * to.channels, inner);
      } else {
        grouped(step, taps, entry, count, q * to.channels, inner);
      }
    });
    written(step);
  }

  PREPARED_HD void linear(const RowStep& step) {
    const RowSlot &from = args_.slots[step.source], &to = args_.slots[step.target];
    const EntryLists have = lists_[step.source], want = wanted(step);
    const T* const weight = args_.tensors[step.data];  // (from size, to size)
    taps_.resize(static_cast<size_t>(from.pixels()));
    int64_t taps = 0;
    over_pixels(step.source, [&](int64_t, int64_t, int64_t p) {
      const int64_t begin = have.offset[p], count = have.offset[p + 1] - begin;
      if (count > 0) taps_[taps++] = {have.entry + begin, count, 0, weight};
    });
    const int64_t first = want.offset[0];
    columns(step, taps, want.entry + first, want.offset[to.pixels()] - first, 0, to.size());
    written(step);
  }

  // Target entries `entry`, whose columns of the weight are entry - first.
  PREPARED_HD void columns(const RowStep& step, int64_t taps, const int32_t* entry, int64_t count,
                           int64_t first, int64_t stride) {
    const bool add = step.mode == WriteMode::kAdd;
    Product product = {slot(step.source), slot(step.target), taps, stride, 1, add};
    blocks<false>(product, entry, count, first);
  }

  // One product of the taps with columns of their weights.
  struct Product {
    const T* source;
    T* target;
    int64_t taps, row_stride, column_stride;  // of the weight
    bool add;
  };

  template <bool kStrided>
  PREPARED_HD void blocks(const Product& product, const int32_t* entry, int64_t count,
                          int64_t first) {
    const auto block = [&](auto size) PREPARED_INLINE {
      constexpr int kCount = decltype(size)::value;
      int64_t column[kCount];
      for (int j = 0; j < kCount; ++j) column[j] = (entry[j] - first) * product.column_stride;
      if (!kStrided && column[kCount - 1] - column[0] == kCount - 1) {
        multiply_block<kCount, true>(product, entry, column);
      } else {
        multiply_block<kCount, false>(product, entry, column);
      }
      entry += kCount;
      count -= kCount;
    };
    while (count >= kBlock) block(std::integral_constant<int, kBlock>());
    if (kBlock > 4 && count >= 4) block(std::integral_constant<int, 4>());
    if (count == 3) return block(std::integral_constant<int, 3>());
    if (count == 2) return block(std::integral_constant<int, 2>());
    if (count == 1) return block(std::integral_constant<int, 1>());
  }

  // kDense: the columns are neighbors.
  template <int kCount, bool kDense>
  PREPARED_HD void multiply_block(const Product& product, const int32_t* entry,
                                  const int64_t* column) {
    const T* const source = product.source;
    T* const target = product.target;
    const int64_t stride = product.row_stride;
    Vec sums[kCount][V];
    for (int j = 0; j < kCount; ++j) {
      for (int v = 0; v < V; ++v) sums[j][v] = product.add ? value(target, entry[j], v) : Vec{};
    }
    for (int64_t t = 0; t < product.taps; ++t) {
      const Tap<T> tap = taps_[t];
      const T* const weight = tap.weight + (kDense ? column[0] : 0) - tap.first * stride;
      for (int64_t k = 0; k < tap.count; ++k) {
        const int64_t e = tap.entry[k];
        const T* const row = weight + e * stride;
        const T* const from = source + e * kRows;
        Vec x[V];
        for (int v = 0; v < V; ++v) x[v] = at<T, kBytes>(from + v * kLane);
        for (int j = 0; j < kCount; ++j) {
          const T w = row[kDense ? j : column[j]];
          for (int v = 0; v < V; ++v) sums[j][v] += w * x[v];
        }
      }
    }
    for (int j = 0; j < kCount; ++j) {
      for (int v = 0; v < V; ++v) value(target, entry[j], v) = sums[j][v];
    }
  }

  // Grouped convolutions, one target entry at a time.
  PREPARED_HD void grouped(const RowStep& step, int64_t taps, const int32_t* entry, int64_t count,
                           int64_t first, int64_t inner) {
    const T* const source = slot(step.source);
    T* const target = slot(step.target);
    const int64_t outer = args_.slots[step.source].channels / step.groups;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t column = entry[n] - first, group = column / inner;
      Vec sums[V];
      for (int v = 0; v < V; ++v) {
        sums[v] = step.mode == WriteMode::kAdd ? value(target, entry[n], v) : Vec{};
      }
      for (int64_t t = 0; t < taps; ++t) {
        const Tap<T> tap = taps_[t];
        for (int64_t k = 0; k < tap.count; ++k) {
          const int64_t channel = tap.entry[k] - tap.first;
          if (channel / outer != group) continue;
          const T w = tap.weight[channel * inner + column % inner];
          for (int v = 0; v < V; ++v) {
            sums[v] += w * at<T, kBytes>(source + tap.entry[k] * kRows + v * kLane);
          }
        }
      }
      for (int v = 0; v < V; ++v) value(target, entry[n], v) = sums[v];
    }
  }

  std::vector<Tap<T>> taps_;
};

}  // namespace torch_prepared
