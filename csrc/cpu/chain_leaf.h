// Bounds of one box of a chain of affine maps and ReLUs; all of it stays in one core's cache.
//
// Neurons that are inactive on a box have a zero relaxation, so rows pulled backward keep the
// columns of active and unstable neurons only. Each map is gathered once per box into such a
// compact matrix, with its bias as one more column. Pulling a coefficient r over the values
// lower <= v <= upper, or over lines with such slopes and offsets, is always
//   max(r, 0) * lower + min(r, 0) * upper,
// so minimizing over boxes, adding offsets and adding the bias are one operation.
#pragma once

#include <limits>
#include <memory>

#include "../common/rounding.h"
#include "chain_workspace.h"

namespace torch_prepared {

template <class T, int kBytes>
class Leaf {
  using V = Vector<T, kBytes>;
  static constexpr int64_t kLanes = lanes<T, kBytes>;

 public:
  Leaf(const ChainBoundsArgs<T>& args, PackedMaps<T>& packed) : args_(args), packed_(packed) {
    int64_t widest = 0;
    for (const ChainMap<T>& map : args.maps) {
      widest = std::max({widest, map.in, map.out});
    }
    const int64_t stride = padded<T, kBytes>(widest + 1);
    for (const ChainMap<T>& map : args.maps) {
      const int64_t columns = padded<T, kBytes>(map.in + 1);
      sides_.push_back(std::make_unique<Side<T>>(map.in, map.out, columns));
    }
    for (Buffer<T>* buffer : {&lower_memory_, &upper_memory_}) *buffer = Buffer<T>(stride);
    for (Buffer<T>& panel : panels_) panel = Buffer<T>(kPanelRows * stride);
    constants_ = Buffer<T>(kPanelRows * kLanes);
    unstable_.resize(static_cast<size_t>(widest));
  }

  // Bounds box i; NaN everywhere in its results when any interval is NaN or has crossed ends.
  PREPARED_HD void run(int64_t i) {
    bool proper = packed_.finite && start(i);
    int64_t first = 0;
    for (size_t k = 0; proper && k + 1 < args_.maps.size(); ++k) {
      proper = bound_layer(i, k, first);
      first += args_.maps[k].out;
    }
    if (proper) {
      bound_rows(i);
    } else {
      spoil(i);
    }
  }

 protected:
  // Rows of one backward pass from map `map`, before each activation: those of side j begin at
  // `at[j]` of the arena. Positive rows of the neurons come first, then their negatives.
  struct Record {
    size_t map;
    int64_t rows;
    std::vector<int32_t> neurons;
    std::vector<size_t> at;
  };

  // Starts the record of rows that are about to be pulled from map k; null: the output's.
  void record(size_t k, int64_t rows, const int32_t* neurons) {
    records_.push_back({k, rows, {}, std::vector<size_t>(k + 1)});
    if (neurons != nullptr) records_.back().neurons.assign(neurons, neurons + rows / 2);
  }

  // Copies the rows on side j into the present record.
  PREPARED_HD void keep(size_t j, int64_t rows) {
    const int64_t count = rows * sides_[j]->stride;
    records_.back().at[j] = arena_.size();
    arena_.insert(arena_.end(), panels_[0].data(), panels_[0].data() + count);
  }

  void spoil(int64_t i) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const int64_t n = args_.maps[0].in, s = args_.count, hidden = args_.hidden;
    std::fill_n(args_.values + i * s, s, nan);
    std::fill_n(args_.input_rows + i * s * n, s * n, nan);
    std::fill_n(args_.hidden_lower + i * hidden, hidden, nan);
    std::fill_n(args_.hidden_upper + i * hidden, hidden, nan);
  }

  // The network's inputs as the first side.
  PREPARED_HD bool start(int64_t i) {
    Side<T>& side = *sides_[0];
    const int64_t n = args_.maps[0].in;
    const T *lower = args_.lower + i * n, *upper = args_.upper + i * n;
    bool proper = true;
    for (int64_t j = 0; j < n; ++j) {
      proper &= lower[j] <= upper[j];
      side.index[j] = static_cast<int32_t>(j);
      side.offset.lower[j] = side.after.lower[j] = lower[j];
      side.offset.upper[j] = side.after.upper[j] = upper[j];
    }
    finish(side, n);
    return proper;
  }

  // Bias column, padding, centers and radii of a side whose `count` columns are set.
  PREPARED_HD void finish(Side<T>& side, int64_t count) {
    side.count = count;
    side.stride = padded<T, kBytes>(count + 1);
    for (Ends<T>* ends : {&side.slope, &side.offset, &side.before, &side.after}) {
      std::fill(ends->lower + count, ends->lower + side.stride, T(0));
      std::fill(ends->upper + count, ends->upper + side.stride, T(0));
    }
    for (Ends<T>* ends : {&side.offset, &side.after}) ends->lower[count] = ends->upper[count] = 1;
    T *center = side.middle_memory.data(), *radius = center + side.stride;
    for (int64_t c = 0; c < side.stride; c += kLanes) {
      const V low = at<T, kBytes>(side.after.lower + c), high = at<T, kBytes>(side.after.upper + c);
      at<T, kBytes>(center + c) = (low + high) * T(0.5);
      at<T, kBytes>(radius + c) = (high - low) * T(0.5);
    }
  }

  // Intervals of hidden layer k, which starts at scalar `first`; false when they are not proper.
  PREPARED_HD bool bound_layer(int64_t i, size_t k, int64_t first) {
    const int64_t m = args_.maps[k].out, at_hidden = i * args_.hidden + first;
    propagate(k);
    if (args_.known_lower != nullptr) {
      for (int64_t j = 0; j < m; ++j) {
        intersect(j, args_.known_lower[at_hidden + j], args_.known_upper[at_hidden + j]);
      }
    }
    if (k > 0) tighten(k);
    const T *lower = lower_memory_.data(), *upper = upper_memory_.data();
    bool proper = true;
    for (int64_t j = 0; j < m; ++j) proper &= lower[j] <= upper[j];
    std::copy_n(lower, m, args_.hidden_lower + at_hidden);
    std::copy_n(upper, m, args_.hidden_upper + at_hidden);
    if (!proper) return false;
    relax(*sides_[k + 1], m, first);
    gather(k, sides_[k + 1]->index.data(), sides_[k + 1]->count);
    return true;
  }

  // Common part; like Interval.intersect, ends that rounding has crossed are both kept.
  PREPARED_HD void intersect(int64_t j, T lower, T upper) {
    T &low = lower_memory_.data()[j], &high = upper_memory_.data()[j];
    const T below = lower > low || lower != lower ? lower : low;
    const T above = upper < high || upper != upper ? upper : high;
    const bool crossed = below > above;
    low = crossed ? above : below;
    high = crossed ? below : above;
  }

  // Interval arithmetic from the box of the map's input side.
  PREPARED_HD void propagate(size_t k) {
    const int64_t stride = packed_.maps[k].stride;
    int64_t column = 0;
    const auto columns = [&](auto size) PREPARED_INLINE {
      constexpr int kVectors = decltype(size)::value;
      for (; column + kVectors * kLanes <= stride; column += kVectors * kLanes) {
        propagate_columns<kVectors>(k, column);
      }
    };
    columns(std::integral_constant<int, 4>());
    columns(std::integral_constant<int, 1>());
  }

  template <int kVectors>
  PREPARED_HD void propagate_columns(size_t k, int64_t column) {
    PackedMap<T>& map = packed_.maps[k];
    Side<T>& side = *sides_[k];
    const T *center = side.middle_memory.data(), *radius = center + side.stride;
    const T *weight = map.weight.data() + column, *magnitude = map.magnitude.data() + column;
    V middle[kVectors], spread[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      middle[v] = at<T, kBytes>(map.bias.data() + column + v * kLanes);
      spread[v] = V{};
    }
    for (int64_t c = 0; c < side.count; ++c) {
      const int64_t row = side.index[c] * map.stride;
      for (int v = 0; v < kVectors; ++v) {
        middle[v] += center[c] * at<T, kBytes>(weight + row + v * kLanes);
        spread[v] += radius[c] * at<T, kBytes>(magnitude + row + v * kLanes);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      at<T, kBytes>(lower_memory_.data() + column + v * kLanes) = middle[v] - spread[v];
      at<T, kBytes>(upper_memory_.data() + column + v * kLanes) = middle[v] + spread[v];
    }
  }

  // Intersects the unstable scalars of layer k with backward bounds, two rows for each.
  PREPARED_HD void tighten(size_t k) {
    const T *lower = lower_memory_.data(), *upper = upper_memory_.data();
    const int64_t m = args_.maps[k].out;
    int64_t unstable = 0;
    for (int64_t j = 0; j < m; ++j) {
      unstable_[unstable] = static_cast<int32_t>(j);
      unstable += !(lower[j] >= 0 || upper[j] <= 0);
    }
    const int64_t stride = sides_[k]->stride;
    for (int64_t begin = 0; begin < unstable; begin += kPanelRows / 2) {
      const int64_t rows = std::min(kPanelRows / 2, unstable - begin);
      gather(k, unstable_.data() + begin, rows, panels_[0].data());
      T *source = panels_[0].data(), *negated = source + rows * stride;
      for (int64_t c = 0; c < rows * stride; c += kLanes) {
        at<T, kBytes>(negated + c) = -at<T, kBytes>(source + c);
      }
      if (recording_) record(k, 2 * rows, unstable_.data() + begin);
      pull<false>(k, 2 * rows);
      for (int64_t r = 0; r < rows; ++r) {
        intersect(unstable_[begin + r], best_[r], -best_[rows + r]);
      }
    }
  }

  PREPARED_HD void gather(size_t k, const int32_t* neurons, int64_t count) {
    gather(k, neurons, count, sides_[k]->matrix_memory.data());
  }

  // Rows of map k for these outputs: the columns of its input side, then the bias, then zeros.
  PREPARED_HD void gather(size_t k, const int32_t* neurons, int64_t count, T* out) {
    const ChainMap<T>& map = args_.maps[k];
    Side<T>& side = *sides_[k];
    const int32_t* const index = side.index.data();
    for (int64_t r = 0; r < count; ++r, out += side.stride) {
      const T* const row = map.weight + neurons[r] * map.in;
#pragma GCC unroll 8
      for (int64_t c = 0; c < side.count; ++c) out[c] = row[index[c]];
      out[side.count] = map.bias[neurons[r]];
      for (int64_t c = side.count + 1; c < side.stride; ++c) out[c] = 0;
    }
  }

  // Lines of the ReLUs of a layer of m neurons, which starts at hidden scalar `first`; those that
  // are zero on the box get no column.
  PREPARED_HD void relax(Side<T>& side, int64_t m, int64_t first) {
    const T *lower = lower_memory_.data(), *upper = upper_memory_.data();
    const T threshold = static_cast<T>(-kOffTie);
    int64_t count = 0;
    for (int64_t j = 0; j < m; ++j) {
      side.index[count] = static_cast<int32_t>(j);
      side.before.lower[count] = lower[j];
      side.before.upper[count] = upper[j];
      count += lower[j] >= 0 || upper[j] > 0;
    }
    for (int64_t c = 0; c < count; c += kLanes) {
      const V low = at<T, kBytes>(side.before.lower + c);
      const V high = at<T, kBytes>(side.before.upper + c);
      const V zero = V{}, one = zero + 1;
      const V chord = low >= 0 ? one : high / (high - low);
      at<T, kBytes>(side.slope.lower + c) = high > threshold * low || low >= 0 ? one : zero;
      at<T, kBytes>(side.slope.upper + c) = chord;
      at<T, kBytes>(side.offset.lower + c) = zero;
      at<T, kBytes>(side.offset.upper + c) = low >= 0 ? zero : -low * chord;
      at<T, kBytes>(side.after.lower + c) = low >= 0 ? low : zero;
      at<T, kBytes>(side.after.upper + c) = high;
    }
    if (shares_ != nullptr) share(side, count, first);
    finish(side, count);
  }

  // Lower slopes of unstable neurons from shares_; negative ones there become the usual slopes.
  PREPARED_HD void share(Side<T>& side, int64_t count, int64_t first) {
    for (int64_t c = 0; c < count; ++c) {
      if (side.before.lower[c] >= 0) continue;
      T& own = shares_[first + side.index[c]];
      if (own < 0) own = side.slope.lower[c];
      side.slope.lower[c] = own;
    }
  }

  // Pulls `rows` rows on the input side of map k, in the first panel, back to the network's
  // inputs; lower bounds go to best_, and the rows on the inputs are left in the first panel.
  template <bool kCuts>
  PREPARED_HD void pull(size_t k, int64_t rows) {
    std::fill_n(constants_.data(), rows * kLanes, T(0));
    for (int64_t r = 0; r < rows; ++r) best_[r] = -std::numeric_limits<T>::infinity();
    for (size_t j = k; j > 0; --j) {
      Side<T>& side = *sides_[j];
      const Panel<T> left = {panels_[0].data(), side.stride};
      if (recording_) keep(j, rows);
      if (kCuts) cut(left, side.after, rows);
      pull_lines(left, side, rows);
      if (kCuts) cut(left, side.before, rows);
      const Panel<T> right = sides_[j - 1]->matrix();
      multiply<T, kBytes>(left, right, rows, side.count, {panels_[1].data(), right.stride});
      std::swap(panels_[0], panels_[1]);
    }
    if (recording_) keep(0, rows);
    cut({panels_[0].data(), sides_[0]->stride}, sides_[0]->offset, rows);
  }

  // One activation backward, in place.
  PREPARED_HD void pull_lines(Panel<T> panel, Side<T>& side, int64_t rows) {
    const T *lower_slope = side.slope.lower, *upper_slope = side.slope.upper;
    const T *lower_offset = side.offset.lower, *upper_offset = side.offset.upper;
    for (int64_t r = 0; r < rows; ++r) {
      T* const row = panel.row(r);
      V sum = at<T, kBytes>(constants_.data() + r * kLanes);
      for (int64_t c = 0; c < panel.stride; c += kLanes) {
        const V all = at<T, kBytes>(row + c);
        const V plus = all > 0 ? all : V{};
        const V minus = all - plus;
        at<T, kBytes>(row + c) =
            plus * at<T, kBytes>(lower_slope + c) + minus * at<T, kBytes>(upper_slope + c);
        sum += plus * at<T, kBytes>(lower_offset + c) + minus * at<T, kBytes>(upper_offset + c);
      }
      at<T, kBytes>(constants_.data() + r * kLanes) = sum;
    }
  }

  // Minima of the rows over a box, where they are better than what was found before.
  PREPARED_HD void cut(Panel<T> panel, const Ends<T>& box, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* const row = panel.row(r);
      V sum = at<T, kBytes>(constants_.data() + r * kLanes);
      for (int64_t c = 0; c < panel.stride; c += kLanes) {
        const V all = at<T, kBytes>(row + c);
        const V plus = all > 0 ? all : V{};
        const V minus = all - plus;
        sum += plus * at<T, kBytes>(box.lower + c) + minus * at<T, kBytes>(box.upper + c);
      }
      const T value = sum_lanes<T, kBytes>(sum);
      if (value > best_[r] || value != value) best_[r] = value;
    }
  }

  PREPARED_HD void bound_rows(int64_t i) {
    const size_t last = args_.maps.size() - 1;
    const int64_t n = args_.maps[0].in, m = args_.maps[last].out;
    for (int64_t j = 0; j < m; ++j) unstable_[j] = static_cast<int32_t>(j);
    gather(last, unstable_.data(), m);
    const Panel<T> right = sides_[last]->matrix();
    for (int64_t begin = 0; begin < args_.count; begin += kPanelRows) {
      const int64_t rows = std::min(kPanelRows, args_.count - begin);
      const T* const source = args_.rows + i * args_.row_stride + begin * m;
      multiply<T, kBytes>({const_cast<T*>(source), m}, right, rows, m,
                          {panels_[0].data(), right.stride});
      pull<true>(last, rows);
      const int64_t at_row = i * args_.count + begin;
      std::copy_n(best_, rows, args_.values + at_row);
      for (int64_t r = 0; r < rows; ++r) {
        std::copy_n(panels_[0].data() + r * sides_[0]->stride, n,
                    args_.input_rows + (at_row + r) * n);
      }
    }
  }

  const ChainBoundsArgs<T>& args_;
  PackedMaps<T>& packed_;
  std::vector<std::unique_ptr<Side<T>>> sides_;
  Buffer<T> lower_memory_, upper_memory_;  // of the present layer
  Buffer<T> panels_[2];
  Buffer<T> constants_;  // what each row gathered on its way, still spread over the lanes
  std::vector<int32_t> unstable_;
  T best_[kPanelRows];
  T* shares_ = nullptr;  // (hidden,) lower slopes of one's own; null: the usual ones
  bool recording_ = false;
  std::vector<Record> records_;
  std::vector<T> arena_;
};

}  // namespace torch_prepared
