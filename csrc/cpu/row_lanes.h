// A backward pass for a few rows of one region, kept in one core's cache.
//
// Every row occupies one lane of a vector: entry e of a slot is `V` vectors with the coefficients
// that all rows of the group have there. Steps then multiply one weight with whole vectors and
// never mix lanes, whatever the layer; entries that cannot matter are left out by lists:
//   - a window of pixels that the rows reach (convolutions read few pixels per neuron),
//   - per pixel, the channels whose neuron is not constantly zero on the region.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../ops/row_program.h"
#include "chain_workspace.h"
#include "panel.h"

namespace torch_prepared {

// Entries of a slot by pixel: those of pixel p are entry[offset[p]] .. entry[offset[p + 1] - 1].
struct EntryLists {
  const int32_t* offset;
  const int32_t* entry;
};

struct Window {
  int64_t begin[2] = {0, 0}, end[2] = {0, 0};

  bool empty() const { return begin[0] >= end[0]; }
  void include(const Window& other) {
    if (other.empty()) return;
    for (int a = 0; a < 2; ++a) {
      begin[a] = empty_ ? other.begin[a] : std::min(begin[a], other.begin[a]);
      end[a] = empty_ ? other.end[a] : std::max(end[a], other.end[a]);
    }
    empty_ = false;
  }

 private:
  bool empty_ = true;
};

struct OwnedLists {
  std::vector<int32_t> offset, entry;
  EntryLists view() const { return {offset.data(), entry.data()}; }
};

// One group of rows: neurons first .. first + count - 1 of `index`, or dense rows.
struct RowGroup {
  int64_t region, first, count;
};

// What one thread reuses, group after group.
template <class T>
struct LaneWorkspace {
  explicit LaneWorkspace(const RowProgramArgs<T>& args, int64_t lanes) : kept(args.lines.size()) {
    for (const RowSlot& slot : args.slots) {
      values.emplace_back(slot.size() * lanes);
      OwnedLists all;
      for (int64_t p = 0; p <= slot.pixels(); ++p) {
        all.offset.push_back(static_cast<int32_t>(p * slot.channels));
      }
      for (int64_t e = 0; e < slot.size(); ++e) all.entry.push_back(static_cast<int32_t>(e));
      full.push_back(std::move(all));
    }
  }

  void reserve_gradient(const RowProgramArgs<T>& args, int64_t lanes) {
    for (const RowSlot& slot : args.slots) adjoints.emplace_back(slot.size() * lanes);
    for (const int64_t s : args.line_slots) saved.emplace_back(args.slots[s].size() * lanes);
  }

  int64_t region = -1;
  std::vector<Buffer<T>> values;  // by slot
  std::vector<OwnedLists> full;   // by slot: every entry
  std::vector<OwnedLists> kept;   // by lines: entries that are not constantly zero
  std::vector<Buffer<T>> saved;   // by lines: rows before they went through, for gradients
  std::vector<Buffer<T>> adjoints;  // by slot, for gradients
  OwnedLists seeds;
};

// One source pixel that contributes to a target pixel.
template <class T>
struct Tap {
  const int32_t* entry;
  int64_t count, first;  // row of the weight for entry e is e - first
  const T* weight;
};

template <class T, int kBytes, int V>
class LanePass {
  using Vec = Vector<T, kBytes>;
  static constexpr int64_t kLane = lanes<T, kBytes>;
  static constexpr int kBlock = kBytes == 64 ? 8 : 4;  // columns that fit the registers

 public:
  static constexpr int64_t kRows = V * kLane;

  LanePass(const RowProgramArgs<T>& args, LaneWorkspace<T>& memory)
      : args_(args), memory_(memory), windows_(args.slots.size()), lists_(args.slots.size()) {}

  // Shares of the group begin at `shares`; null when slopes are not each row's own.
  PREPARED_HD void run(const RowGroup& group, const T* shares) {
    pass(group, shares);
    store();
  }

  // Number of shares of a group; their values at the start go to `into` unless it is null.
  PREPARED_HD int64_t start_shares(const RowGroup& group, T* into) {
    place(group);
    int64_t count = 0;
    for (const RowStep& step : args_.steps) {
      if (step.kind != StepKind::kRelax || windows_[step.source].empty()) continue;
      const int64_t region = group_.region * args_.slots[step.source].size();
      const T *slope = args_.lines[step.data].part[0] + region;
      const T *free = args_.free[step.data] + region;
      over_entries(step.source, memory_.kept[step.data].view(), [&](int64_t e) PREPARED_INLINE {
        if (free[e] == 0) return;
        if (into != nullptr) std::fill_n(into + count, kRows, 1 - (1 - slope[e]) / free[e]);
        count += kRows;
      });
    }
    return count;
  }

 protected:
  T* slot(int64_t s) { return memory_.values[s].data(); }

  PREPARED_HD Vec& value(T* base, int64_t entry, int v) {
    return at<T, kBytes>(base + entry * kRows + v * kLane);
  }

  // Rows of the group on slot 0, and where they will reach.
  PREPARED_HD void place(const RowGroup& group) {
    group_ = group;
    if (memory_.region != group.region) enter_region();
    for (Window& window : windows_) window = Window();
    for (size_t s = 0; s < lists_.size(); ++s) lists_[s] = memory_.full[s].view();
    if (args_.rows != nullptr) {
      load_rows();
    } else {
      seed();
    }
    reach();
  }

  PREPARED_HD void pass(const RowGroup& group, const T* shares) {
    place(group);
    shares_ = shares;
    for (int v = 0; v < V; ++v) {
      constant_[v] = Vec{};
      best_[v] = Vec{} - std::numeric_limits<T>::infinity();
    }
    for (const RowStep& step : args_.steps) apply(step);
  }

  // Which entries survive each activation on the present region.
  void enter_region() {
    memory_.region = group_.region;
    for (size_t k = 0; k < args_.lines.size(); ++k) {
      const RowSlot& shape = args_.slots[args_.line_slots[k]];
      OwnedLists& kept = memory_.kept[k];
      kept.offset.assign(1, 0);
      kept.entry.clear();
      const T* part[4];
      for (int i = 0; i < 4; ++i) part[i] = args_.lines[k].part[i] + group_.region * shape.size();
      for (int64_t p = 0, e = 0; p < shape.pixels(); ++p) {
        for (int64_t c = 0; c < shape.channels; ++c, ++e) {
          bool zero = part[0][e] == 0 && part[1][e] == 0 && part[2][e] == 0 && part[3][e] == 0;
          if (!args_.free.empty()) zero &= args_.free[k][group_.region * shape.size() + e] == 0;
          if (!zero) kept.entry.push_back(static_cast<int32_t>(e));
        }
        kept.offset.push_back(static_cast<int32_t>(kept.entry.size()));
      }
    }
  }

  // Rows +1 and -1 on the neurons of the group.
  PREPARED_HD void seed() {
    const RowSlot& shape = args_.slots[0];
    OwnedLists& seeds = memory_.seeds;
    seeds.entry.resize(static_cast<size_t>(group_.count));
    seeds.offset.assign(static_cast<size_t>(shape.pixels() + 1), 0);
    T* base = slot(0);
    for (int64_t i = 0; i < group_.count; ++i) {
      const int64_t e = args_.index[group_.first + i], p = e / shape.channels;
      seeds.entry[i] = static_cast<int32_t>(e);
      ++seeds.offset[p + 1];
      Window one;
      one.begin[0] = p / shape.width, one.begin[1] = p % shape.width;
      one.end[0] = one.begin[0] + 1, one.end[1] = one.begin[1] + 1;
      windows_[0].include(one);
      for (int v = 0; v < V; ++v) value(base, e, v) = Vec{};
      base[e * kRows + i] = 1;
      base[e * kRows + kRows / 2 + i] = -1;
    }
    for (int64_t p = 0; p < shape.pixels(); ++p) seeds.offset[p + 1] += seeds.offset[p];
    lists_[0] = seeds.view();
  }

  PREPARED_HD void load_rows() {
    const RowSlot& shape = args_.slots[0];
    const int64_t n = shape.size();
    const T* const from = args_.rows + (group_.region * args_.count + group_.first) * n;
    T* base = slot(0);
    for (int64_t e = 0; e < n; ++e) {
      for (int64_t i = 0; i < kRows; ++i) {
        base[e * kRows + i] = i < group_.count ? from[i * n + e] : T(0);
      }
    }
    windows_[0].include(whole(shape));
  }

  static Window whole(const RowSlot& shape) {
    Window all;
    all.end[0] = shape.height, all.end[1] = shape.width;
    return all;
  }

  // Windows of all slots, following the steps.
  void reach() {
    for (const RowStep& step : args_.steps) {
      const bool moves = step.kind == StepKind::kConv || step.kind == StepKind::kLinear ||
                         step.kind == StepKind::kRelax || step.kind == StepKind::kAdd;
      if (!moves || step.source == step.target) continue;
      const Window& from = windows_[step.source];
      if (from.empty()) continue;
      const RowSlot& shape = args_.slots[step.target];
      Window to = from;
      if (step.kind == StepKind::kLinear) to = whole(shape);
      if (step.kind == StepKind::kConv) {
        const int64_t limit[2] = {shape.height, shape.width};
        for (int a = 0; a < 2; ++a) {
          const int64_t span = (step.kernel[a] - 1) * step.dilation[a] + 1;
          const int64_t begin = from.begin[a] * step.stride[a] - step.padding[a];
          const int64_t end = (from.end[a] - 1) * step.stride[a] - step.padding[a] + span;
          to.begin[a] = std::min(std::max<int64_t>(begin, 0), limit[a]);
          to.end[a] = std::max(std::min(end, limit[a]), to.begin[a]);
        }
        if (to.begin[1] == to.end[1]) to.end[0] = to.begin[0];
      }
      windows_[step.target].include(to);
    }
  }

  PREPARED_HD void apply(const RowStep& step) {
    if (windows_[step.source].empty()) return;
    switch (step.kind) {
      case StepKind::kConv:
        return conv(step);
      case StepKind::kLinear:
        return linear(step);
      case StepKind::kRelax:
        return relax(step);
      case StepKind::kDot:
        return dot(step);
      case StepKind::kAdd:
        return add(step);
      case StepKind::kScale:
        return scale(step);
      case StepKind::kCut:
        return cut(step);
    }
  }

  // Entries of the target that a step has to write.
  EntryLists wanted(const RowStep& step) {
    const bool narrow = step.mode == WriteMode::kOnly && step.wanted >= 0;
    return narrow ? memory_.kept[step.wanted].view() : memory_.full[step.target].view();
  }

  template <class F>
  PREPARED_HD void over_pixels(int64_t s, const F& f) {
    const Window window = windows_[s];
    const int64_t width = args_.slots[s].width;
    for (int64_t y = window.begin[0]; y < window.end[0]; ++y) {
      for (int64_t x = window.begin[1]; x < window.end[1]; ++x) f(y, x, y * width + x);
    }
  }

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

  // Lists of a target that a step has just written.
  void written(const RowStep& step) {
    lists_[step.target] = wanted(step);
  }

  PREPARED_HD void clear(int64_t s) {
    T* const base = slot(s);
    const int64_t channels = args_.slots[s].channels;
    over_pixels(s, [&](int64_t, int64_t, int64_t p) PREPARED_INLINE {
      std::fill_n(base + p * channels * kRows, channels * kRows, T(0));
    });
  }

  // Calls f(entry) for what the source's lists hold within its window.
  template <class F>
  PREPARED_HD void over_entries(int64_t s, const EntryLists& lists, const F& f) {
    over_pixels(s, [&](int64_t, int64_t, int64_t p) PREPARED_INLINE {
      for (int64_t k = lists.offset[p]; k < lists.offset[p + 1]; ++k) f(lists.entry[k]);
    });
  }

  PREPARED_HD void relax(const RowStep& step) {
    const int64_t region = group_.region * args_.slots[step.source].size();
    const RowLines<T>& lines = args_.lines[step.data];
    const T *ls = lines.part[0] + region, *lo = lines.part[1] + region;
    const T *us = lines.part[2] + region, *uo = lines.part[3] + region;
    T *const source = slot(step.source), *const target = slot(step.target);
    const bool in_place = step.source == step.target;
    if (!in_place && step.mode == WriteMode::kFirst) clear(step.target);
    const bool add = !in_place && step.mode != WriteMode::kOnly;
    const EntryLists kept = memory_.kept[step.data].view();
    const T* const free = args_.free.empty() ? nullptr : args_.free[step.data] + region;
    T* saved = saves() ? memory_.saved[step.data].data() : nullptr;
    over_entries(step.source, kept, [&](int64_t e) PREPARED_INLINE {
      const T* const share = take_share(free, e);
      for (int v = 0; v < V; ++v) {
        const Vec x = value(source, e, v);
        if (saved != nullptr) at<T, kBytes>(saved + v * kLane) = x;
        const Vec low = lower_slope(ls[e], uo[e], share, free, e, v), high = Vec{} + us[e];
        const Vec below = Vec{} + lo[e], above = Vec{} + uo[e];
        const Vec moved = x * (x >= 0 ? low : high);
        constant_[v] += x * (x >= 0 ? below : above);
        Vec& into = value(target, e, v);
        into = add ? into + moved : moved;
      }
      if (saved != nullptr) saved += kRows;
    });
    if (in_place || step.mode == WriteMode::kOnly) {
      lists_[step.target] = kept;
    } else {
      lists_[step.target] = memory_.full[step.target].view();
    }
  }

  bool saves() const { return !memory_.saved.empty(); }

  // The next shares when entry e has some, else null.
  PREPARED_HD const T* take_share(const T* free, int64_t e) {
    if (shares_ == nullptr || free[e] == 0) return nullptr;
    const T* const share = shares_;
    shares_ += kRows;
    return share;
  }

  // Slope of the line below entry e: each row's own where the neuron is unstable now.
  PREPARED_HD Vec lower_slope(T usual, T upper_offset, const T* share, const T* free, int64_t e,
                              int v) {
    if (share == nullptr || !(upper_offset > 0)) return Vec{} + usual;
    Vec own;
    __builtin_memcpy(&own, share + v * kLane, kBytes);
    return 1 - free[e] * (1 - own);
  }

  PREPARED_HD void dot(const RowStep& step) {
    const T* const vector = args_.tensors[step.data];
    T* const source = slot(step.source);
    over_entries(step.source, lists_[step.source], [&](int64_t e) PREPARED_INLINE {
      for (int v = 0; v < V; ++v) constant_[v] += vector[e] * value(source, e, v);
    });
  }

  PREPARED_HD void add(const RowStep& step) {
    T *const source = slot(step.source), *const target = slot(step.target);
    const T sign = static_cast<T>(step.sign);
    if (step.mode == WriteMode::kFirst) clear(step.target);
    const bool add = step.mode != WriteMode::kOnly;
    over_entries(step.source, lists_[step.source], [&](int64_t e) PREPARED_INLINE {
      for (int v = 0; v < V; ++v) {
        const Vec moved = sign * value(source, e, v);
        Vec& into = value(target, e, v);
        into = add ? into + moved : moved;
      }
    });
    lists_[step.target] = add ? memory_.full[step.target].view() : lists_[step.source];
  }

  PREPARED_HD void scale(const RowStep& step) {
    const T* const vector = args_.tensors[step.data];
    T* const source = slot(step.source);
    over_entries(step.source, lists_[step.source], [&](int64_t e) PREPARED_INLINE {
      for (int v = 0; v < V; ++v) value(source, e, v) *= vector[e];
    });
  }

  PREPARED_HD void cut(const RowStep& step) {
    const int64_t region = group_.region * args_.slots[step.source].size();
    const RowBox<T>& box = args_.boxes[step.data];
    const T *center = box.center + region, *radius = box.radius + region;
    T* const source = slot(step.source);
    Vec found[V];
    for (int v = 0; v < V; ++v) found[v] = constant_[v];
    over_entries(step.source, lists_[step.source], [&](int64_t e) PREPARED_INLINE {
      for (int v = 0; v < V; ++v) {
        const Vec x = value(source, e, v);
        found[v] += center[e] * x - radius[e] * (x < 0 ? -x : x);
      }
    });
    for (int v = 0; v < V; ++v) {
      const Vec now = found[v], old = best_[v];
      best_[v] = (now > old) | (now != now) ? now : old;
    }
  }

  PREPARED_HD void store() {
    T best[kRows], constant[kRows];
    const bool independent = args_.input_slot < 0 || windows_[args_.input_slot].empty();
    for (int v = 0; v < V; ++v) {
      const Vec now = constant_[v], old = best_[v];
      const Vec better = (now > old) | (now != now) ? now : old;
      __builtin_memcpy(best + v * kLane, independent ? &better : &old, kBytes);
      __builtin_memcpy(constant + v * kLane, &constant_[v], kBytes);
    }
    if (args_.rows == nullptr) {
      std::copy_n(best, group_.count, args_.lower + group_.first);
      std::copy_n(best + kRows / 2, group_.count, args_.lower + args_.indexed + group_.first);
      return;
    }
    const int64_t row = group_.region * args_.count + group_.first;
    std::copy_n(best, group_.count, args_.lower + row);
    std::copy_n(constant, group_.count, args_.constants + row);
    if (args_.input_slot < 0) return;
    const int64_t n = args_.slots[args_.input_slot].size();
    const T* const base = slot(args_.input_slot);
    for (int64_t i = 0; i < group_.count; ++i) {
      T* const out = args_.input_rows + (row + i) * n;
      for (int64_t e = 0; e < n; ++e) out[e] = independent ? T(0) : base[e * kRows + i];
    }
  }

  const RowProgramArgs<T>& args_;
  LaneWorkspace<T>& memory_;
  RowGroup group_ = {};
  std::vector<Window> windows_;
  std::vector<EntryLists> lists_;
  std::vector<Tap<T>> taps_;
  Vec constant_[V], best_[V];
  const T* shares_ = nullptr;
};

}  // namespace torch_prepared
