// A backward pass for a few rows of one region: every step in turn, and the bounds they give.
#pragma once

#include <limits>

#include "row_products.h"

namespace torch_prepared {

template <class T, int kBytes, int V>
class LanePass : public LaneProducts<T, kBytes, V> {
  using Base = LaneProducts<T, kBytes, V>;

 public:
  using Base::Base, Base::kRows;

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
      const T* slope = args_.lines[step.data].part[0] + region;
      const T* free = args_.free[step.data] + region;
      over_entries(step.source, memory_.kept[step.data].view(), [&](int64_t e) PREPARED_INLINE {
        if (free[e] == 0) return;
        if (into != nullptr) std::fill_n(into + count, kRows, 1 - (1 - slope[e]) / free[e]);
        count += kRows;
      });
    }
    return count;
  }

 protected:
  using Base::args_, Base::group_, Base::lists_, Base::memory_, Base::windows_;
  using Base::clear, Base::kLane, Base::over_entries, Base::place, Base::slot, Base::value;
  using typename Base::Vec;

  PREPARED_HD void pass(const RowGroup& group, const T* shares) {
    place(group);
    shares_ = shares;
    for (int v = 0; v < V; ++v) {
      constant_[v] = Vec{};
      best_[v] = Vec{} - std::numeric_limits<T>::infinity();
    }
    for (const RowStep& step : args_.steps) apply(step);
  }

  PREPARED_HD void apply(const RowStep& step) {
    if (windows_[step.source].empty()) return;
    switch (step.kind) {
      case StepKind::kConv:
        return this->conv(step);
      case StepKind::kLinear:
        return this->linear(step);
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

  Vec constant_[V], best_[V];
  const T* shares_ = nullptr;
};

}  // namespace torch_prepared
