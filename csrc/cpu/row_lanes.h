// Rows of one region in the lanes of vectors, kept in one core's cache: where they are.
//
// Every row occupies one lane of a vector: entry e of a slot is `V` vectors with the coefficients
// that all rows of the group have there. Steps then multiply one weight with whole vectors and
// never mix lanes, whatever the layer; entries that cannot matter are left out by lists:
//   - a window of pixels that the rows reach (convolutions read few pixels per neuron),
//   - per pixel, the channels whose neuron is not constantly zero on the region.
#pragma once

#include "panel.h"
#include "row_workspace.h"

namespace torch_prepared {

template <class T, int kBytes, int V>
class LaneRows {
 protected:
  using Vec = Vector<T, kBytes>;
  static constexpr int64_t kLane = lanes<T, kBytes>;

 public:
  static constexpr int64_t kRows = V * kLane;

  LaneRows(const RowProgramArgs<T>& args, LaneWorkspace<T>& memory)
      : args_(args), memory_(memory), windows_(args.slots.size()), lists_(args.slots.size()) {}

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

  // Lists of a target that a step has just written.
  void written(const RowStep& step) { lists_[step.target] = wanted(step); }

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

  const RowProgramArgs<T>& args_;
  LaneWorkspace<T>& memory_;
  RowGroup group_ = {};
  std::vector<Window> windows_;
  std::vector<EntryLists> lists_;
};

}  // namespace torch_prepared
