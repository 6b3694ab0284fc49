// The gradient of a backward pass in its lines: the pass once more, then each step's adjoint.
//
// The adjoint of rows on a value is a point that the value may take: the corner of the input box
// that minimizes the rows, moved forward through the lines that each row selected.
#pragma once

#include "row_pass.h"

namespace torch_prepared {

template <class T, int kBytes, int V>
class LaneAdjoint : private LanePass<T, kBytes, V> {
  using Base = LanePass<T, kBytes, V>;
  using Vec = Vector<T, kBytes>;
  using Base::args_, Base::group_, Base::lists_, Base::memory_, Base::taps_, Base::windows_;
  using Base::over_entries, Base::over_pixels, Base::value;
  static constexpr int64_t kLane = lanes<T, kBytes>;

 public:
  using Base::kRows;

  LaneAdjoint(const RowProgramArgs<T>& args, LaneWorkspace<T>& memory) : Base(args, memory) {
    for (const RowStep& step : args.steps) {
      fixed_ &= step.kind != StepKind::kRelax || step.source != 0;
    }
  }

  // `lines`: where to add the gradients of this region's lines, by line and then by part.
  PREPARED_HD void run(const RowGroup& group, const T* shares, const RowGradientArgs<T>& gradient,
                       int64_t piece, T* grad_shares) {
    Base::pass(group, shares);
    gradient_ = &gradient;
    piece_ = piece;
    load_gradient();
    prepare(shares, grad_shares);
    for (size_t s = 0; s < windows_.size(); ++s) {
      if (windows_[s].empty()) continue;
      T* const base = adjoint(s);
      over_entries(s, lists_[s], [&](int64_t e) PREPARED_INLINE {
        for (int v = 0; v < V; ++v) value(base, e, v) = Vec{};
      });
    }
    for (size_t i = args_.steps.size(); i-- > 0;) {
      if (!windows_[args_.steps[i].source].empty()) undo(i);
    }
  }

 private:
  T* adjoint(int64_t s) { return memory_.adjoints[s].data(); }

  // Gradient of every lane; zero for lanes without a row.
  PREPARED_HD void load_gradient() {
    T lane[kRows] = {};
    const T* const from = gradient_->grad_lower;
    if (args_.rows == nullptr) {
      std::copy_n(from + group_.first, group_.count, lane);
      std::copy_n(from + args_.indexed + group_.first, group_.count, lane + kRows / 2);
    } else {
      std::copy_n(from + group_.region * args_.count + group_.first, group_.count, lane);
    }
    __builtin_memcpy(grad_, lane, sizeof(grad_));
  }

  // Where the shares of each step begin.
  PREPARED_HD void prepare(const T* shares, T* grad_shares) {
    first_share_.assign(args_.steps.size(), 0);
    shares_ = shares;
    grad_shares_ = grad_shares;
    int64_t count = 0;
    if (shares == nullptr) return;
    for (size_t i = 0; i < args_.steps.size(); ++i) {
      const RowStep& step = args_.steps[i];
      first_share_[i] = count;
      if (step.kind != StepKind::kRelax || windows_[step.source].empty()) continue;
      const T* const free = args_.free[step.data] + group_.region * args_.slots[step.source].size();
      over_entries(step.source, memory_.kept[step.data].view(),
                   [&](int64_t e) PREPARED_INLINE { count += free[e] == 0 ? 0 : kRows; });
    }
  }

  PREPARED_HD void undo(size_t i) {
    const RowStep& step = args_.steps[i];
    switch (step.kind) {
      case StepKind::kConv:
        return fixed_ && step.source == 0 ? void() : conv(step);
      case StepKind::kLinear:
        return fixed_ && step.source == 0 ? void() : linear(step);
      case StepKind::kRelax:
        return relax(step, first_share_[i]);
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

  PREPARED_HD void cut(const RowStep& step) {
    const int64_t region = group_.region * args_.slots[step.source].size();
    const RowBox<T>& box = args_.boxes[step.data];
    const T *center = box.center + region, *radius = box.radius + region;
    T *const rows = Base::slot(step.source), *const out = adjoint(step.source);
    over_entries(step.source, lists_[step.source], [&](int64_t e) PREPARED_INLINE {
      for (int v = 0; v < V; ++v) {
        const Vec x = value(rows, e, v), away = Vec{} + radius[e];
        const Vec step_to = x > 0 ? away : (x < 0 ? -away : Vec{});
        value(out, e, v) += grad_[v] * (center[e] - step_to);
      }
    });
  }

  PREPARED_HD void dot(const RowStep& step) {
    const T* const vector = args_.tensors[step.data];
    T* const out = adjoint(step.source);
    over_entries(step.source, lists_[step.source], [&](int64_t e) PREPARED_INLINE {
      for (int v = 0; v < V; ++v) value(out, e, v) += vector[e] * grad_[v];
    });
  }

  PREPARED_HD void add(const RowStep& step) {
    T *const out = adjoint(step.source), *const from = adjoint(step.target);
    const T sign = static_cast<T>(step.sign);
    over_entries(step.source, lists_[step.source], [&](int64_t e) PREPARED_INLINE {
      for (int v = 0; v < V; ++v) value(out, e, v) += sign * value(from, e, v);
    });
  }

  PREPARED_HD void scale(const RowStep& step) {
    const T* const vector = args_.tensors[step.data];
    T* const out = adjoint(step.source);
    over_entries(step.source, lists_[step.source], [&](int64_t e) PREPARED_INLINE {
      for (int v = 0; v < V; ++v) value(out, e, v) *= vector[e];
    });
  }

  PREPARED_HD void relax(const RowStep& step, int64_t first_share) {
    const int64_t region = group_.region * args_.slots[step.source].size();
    const RowLines<T>& lines = args_.lines[step.data];
    const T* part[4];
    T* grad[4];
    const int64_t size = args_.slots[step.source].size();
    for (int k = 0; k < 4; ++k) {
      part[k] = lines.part[k] + region;
      const int64_t plane = (piece_ * 4 + k) * args_.regions;
      grad[k] = gradient_->lines[step.data] + plane * size + region;
    }
    const T* const free = args_.free.empty() ? nullptr : args_.free[step.data] + region;
    const T* saved = memory_.saved[step.data].data();
    T *const out = adjoint(step.source), *const from = adjoint(step.target);
    const bool in_place = step.source == step.target;
    over_entries(step.source, memory_.kept[step.data].view(), [&](int64_t e) PREPARED_INLINE {
      const bool shared = shares_ != nullptr && free[e] != 0;
      const T* const share = shared ? shares_ + first_share : nullptr;
      const bool own = shared && part[3][e] > 0;
      Vec sums[4] = {};
      for (int v = 0; v < V; ++v) {
        const Vec x = at<T, kBytes>(saved + v * kLane), a = value(from, e, v), none = Vec{};
        const Vec slope = Base::lower_slope(part[0][e], part[3][e], share, free, e, v);
        const Vec below = none + part[1][e], high = none + part[2][e], above = none + part[3][e];
        const Vec moved = a * (x >= 0 ? slope : high) + grad_[v] * (x >= 0 ? below : above);
        Vec& into = value(out, e, v);
        into = in_place ? moved : into + moved;
        const Vec plus = x >= 0 ? x : none, minus = x - plus;
        const Vec to_slope = plus * a;
        if (shared) {
          const Vec to_share = own ? free[e] * to_slope : none;
          __builtin_memcpy(grad_shares_ + first_share + v * kLane, &to_share, kBytes);
        }
        sums[0] += own ? none : to_slope;
        sums[1] += plus * grad_[v];
        sums[2] += minus * a;
        sums[3] += minus * grad_[v];
      }
      for (int k = 0; k < 4; ++k) grad[k][e] += sum_lanes<T, kBytes>(sums[k]);
      saved += kRows;
      if (shared) first_share += kRows;
    });
  }

  // adjoint(source) += weight @ adjoint(target)
  PREPARED_HD void linear(const RowStep& step) {
    const RowSlot& to = args_.slots[step.target];
    const EntryLists have = lists_[step.source], far = lists_[step.target];
    taps_.resize(1);
    taps_[0] = {far.entry + far.offset[0], far.offset[to.pixels()] - far.offset[0], 0,
                args_.tensors[step.data]};
    typename Base::Product product = {
        adjoint(step.target), adjoint(step.source), 1, 1, to.size(), true};
    over_pixels(step.source, [&](int64_t, int64_t, int64_t p) PREPARED_INLINE {
      Base::template blocks<true>(product, have.entry + have.offset[p],
                                  have.offset[p + 1] - have.offset[p], 0);
    });
  }

  PREPARED_HD void conv(const RowStep& step) {
    const RowSlot &from = args_.slots[step.source], &to = args_.slots[step.target];
    const Window window = windows_[step.target];
    const EntryLists have = lists_[step.source], far = lists_[step.target];
    const int64_t inner = to.channels / step.groups;
    taps_.resize(static_cast<size_t>(step.kernel[0] * step.kernel[1]));
    over_pixels(step.source, [&](int64_t y, int64_t x, int64_t p) PREPARED_INLINE {
      int64_t taps = 0;
      for (int64_t ky = 0; ky < step.kernel[0]; ++ky) {
        const int64_t qy = y * step.stride[0] - step.padding[0] + ky * step.dilation[0];
        if (qy < window.begin[0] || qy >= window.end[0]) continue;
        for (int64_t kx = 0; kx < step.kernel[1]; ++kx) {
          const int64_t qx = x * step.stride[1] - step.padding[1] + kx * step.dilation[1];
          if (qx < window.begin[1] || qx >= window.end[1]) continue;
          const int64_t q = qy * to.width + qx, begin = far.offset[q];
          const int64_t tap = (ky * step.kernel[1] + kx) * from.channels * inner;
          taps_[taps++] = {far.entry + begin, far.offset[q + 1] - begin, q * to.channels,
                           args_.tensors[step.data] + tap};
        }
      }
      const int32_t* const entry = have.entry + have.offset[p];
      const int64_t count = have.offset[p + 1] - have.offset[p];
      if (step.groups > 1) return grouped(step, taps, entry, count, p * from.channels);
      typename Base::Product product = {
          adjoint(step.target), adjoint(step.source), taps, 1, inner, true};
      Base::template blocks<true>(product, entry, count, p * from.channels);
    });
  }

  PREPARED_HD void grouped(const RowStep& step, int64_t taps, const int32_t* entry, int64_t count,
                           int64_t first) {
    const RowSlot &from = args_.slots[step.source], &to = args_.slots[step.target];
    const int64_t inner = to.channels / step.groups, outer = from.channels / step.groups;
    T *const source = adjoint(step.target), *const target = adjoint(step.source);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t row = entry[n] - first;
      for (int64_t t = 0; t < taps; ++t) {
        const Tap<T> tap = taps_[t];
        for (int64_t k = 0; k < tap.count; ++k) {
          const int64_t channel = tap.entry[k] - tap.first;
          if (channel / inner != row / outer) continue;
          const T w = tap.weight[row * inner + channel % inner];
          for (int v = 0; v < V; ++v) {
            value(target, entry[n], v) += w * value(source, tap.entry[k], v);
          }
        }
      }
    }
  }

  const RowGradientArgs<T>* gradient_ = nullptr;
  int64_t piece_ = 0;
  bool fixed_ = true;  // no lines read slot 0: nothing wants the adjoint of the rows given
  Vec grad_[V];
  const T* shares_ = nullptr;
  T* grad_shares_ = nullptr;
  std::vector<int64_t> first_share_;
};

}  // namespace torch_prepared
