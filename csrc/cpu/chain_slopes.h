// Slopes of one box of a chain, optimized by gradient ascent on one row's bound, all in one core.
//
// A backward pass keeps the coefficients that its rows have before each activation. The derivative
// of a row's bound with respect to the lines it went through is then found forward: its minimizing
// corner of the box moves through the lines that its signs picked, and at each neuron the bound
// grows with the slope by coefficient times value. The bounds of hidden neurons, of which the upper
// lines are made, are differentiated likewise, last layer first. Intersections are passed through.
#pragma once

#include <vector>

#include "../ops/chain_slopes.h"
#include "chain_leaf.h"

namespace torch_prepared {

template <class T, int kBytes>
class SlopeLeaf : public Leaf<T, kBytes> {
  using Base = Leaf<T, kBytes>;
  using V = Vector<T, kBytes>;
  static constexpr int64_t kLanes = lanes<T, kBytes>;

 public:
  SlopeLeaf(const ChainSlopesArgs<T>& args, PackedMaps<T>& packed)
      : Base(args.bounds, packed), search_(args) {
    const size_t hidden = static_cast<size_t>(args.bounds.hidden);
    for (std::vector<T>* each :
         {&work_, &best_slopes_, &gradient_, &first_, &second_, &to_lower_, &to_upper_}) {
      each->resize(hidden);
    }
    int64_t widest = 0;
    for (const ChainMap<T>& map : args.bounds.maps) widest = std::max({widest, map.in, map.out});
    point_ = Buffer<T>(padded<T, kBytes>(widest + 1));
    next_ = Buffer<T>(padded<T, kBytes>(widest + 1));
    this->shares_ = work_.data();
  }

  PREPARED_HD void run(int64_t i) {
    const int64_t hidden = this->args_.hidden;
    const T* const given = search_.given + i * hidden;
    std::copy_n(given, hidden, work_.data());
    if (search_.search.iterations > 0) optimize(i);
    T* const into = search_.slopes + i * hidden;
    const T levels = static_cast<T>(search_.search.levels);
    for (int64_t h = 0; h < hidden; ++h) {
      into[h] = work_[h] < 0 ? work_[h] : std::round(work_[h] * levels) / levels;
    }
    std::copy_n(into, hidden, work_.data());
    this->recording_ = false;
    Base::run(i);
  }

 private:
  PREPARED_HD void optimize(int64_t i) {
    const SlopeSearch& search = search_.search;
    const int64_t hidden = this->args_.hidden;
    std::fill(first_.begin(), first_.end(), T(0));
    std::fill(second_.begin(), second_.end(), T(0));
    T best = -std::numeric_limits<T>::infinity(), start = best;
    double rate = search.rate, fade_first = 1, fade_second = 1;
    for (int64_t step = 1; step <= search.iterations + 1; ++step) {
      const T value = forward(i);
      if (step == 1) std::copy_n(work_.data(), hidden, best_slopes_.data()), start = value;
      if (!(value > best) && !(value <= best)) break;  // NaN
      if (value > best) {
        best = value;
        std::copy_n(work_.data(), hidden, best_slopes_.data());
      }
      const T enough = search_.enough[i];
      if (best > enough || step > search.iterations) break;
      if (step > search.patience && !(best - start > enough - best)) break;
      differentiate();
      fade_first *= search.momentum;
      fade_second *= search.square_momentum;
      climb(rate, 1 - fade_first, 1 - fade_second);
      rate *= search.decay;
    }
    std::copy_n(best_slopes_.data(), hidden, work_.data());
  }

  // One step of Adam; slopes that no line depends on stay where they are.
  PREPARED_HD void climb(double rate, double whole_first, double whole_second) {
    const T keep_first = T(search_.search.momentum);
    const T keep_second = T(search_.search.square_momentum);
    for (size_t h = 0; h < work_.size(); ++h) {
      if (work_[h] < 0) continue;
      const T gradient = gradient_[h];
      first_[h] = keep_first * first_[h] + (1 - keep_first) * gradient;
      second_[h] = keep_second * second_[h] + (1 - keep_second) * gradient * gradient;
      const T scale = std::sqrt(second_[h] / T(whole_second)) + T(1e-12);
      const T moved = work_[h] + T(rate) * (first_[h] / T(whole_first)) / scale;
      work_[h] = std::min(T(1), std::max(T(0), moved));
    }
  }

  // The bound of the wanted row, everything recorded; NaN when an interval is improper.
  PREPARED_HD T forward(int64_t i) {
    this->recording_ = true;
    this->records_.clear();
    this->arena_.clear();
    const size_t last = this->args_.maps.size() - 1;
    bool proper = this->packed_.finite && this->start(i);
    int64_t first = 0;
    for (size_t k = 0; proper && k < last; ++k) {
      proper = this->bound_layer(i, k, first);
      first += this->args_.maps[k].out;
    }
    if (!proper) return std::numeric_limits<T>::quiet_NaN();
    const int64_t m = this->args_.maps[last].out;
    for (int64_t j = 0; j < m; ++j) this->unstable_[j] = static_cast<int32_t>(j);
    this->gather(last, this->unstable_.data(), m);
    const Panel<T> right = this->sides_[last]->matrix();
    const T* const source = this->args_.rows + i * this->args_.row_stride + search_.row[i] * m;
    multiply<T, kBytes>({const_cast<T*>(source), m}, right, 1, m,
                        {this->panels_[0].data(), right.stride});
    this->record(last, 1, nullptr);
    this->template pull<false>(last, 1);
    return this->best_[0];
  }

  // Derivatives of the wanted row's bound in all slopes, into gradient_.
  PREPARED_HD void differentiate() {
    for (std::vector<T>* each : {&gradient_, &to_lower_, &to_upper_}) {
      std::fill(each->begin(), each->end(), T(0));
    }
    for (size_t r = this->records_.size(); r-- > 0;) {
      const typename Base::Record& record = this->records_[r];
      if (record.neurons.empty()) {
        follow(record, 0, T(1));
        continue;
      }
      const int64_t half = record.rows / 2, base = layer_start(record.map);
      for (int64_t e = 0; e < half; ++e) {
        const int64_t h = base + record.neurons[e];
        if (to_lower_[h] != 0) follow(record, e, to_lower_[h]);
        if (to_upper_[h] != 0) follow(record, half + e, -to_upper_[h]);
      }
    }
  }

  // Hidden scalars before the outputs of map k.
  PREPARED_HD int64_t layer_start(size_t k) const {
    int64_t first = 0;
    for (size_t j = 0; j < k; ++j) first += this->args_.maps[j].out;
    return first;
  }

  // Moves the minimizing corner of one recorded row forward; `weight` is the derivative in it.
  PREPARED_HD void follow(const typename Base::Record& record, int64_t row, T weight) {
    corner(record, row);
    int64_t first = 0;
    for (size_t j = 1; j <= record.map; ++j) {
      Side<T>& side = *this->sides_[j];
      Side<T>& before = *this->sides_[j - 1];
      const T* const coefficients = this->arena_.data() + record.at[j] + row * side.stride;
      const bool more = j < record.map;
      const T* matrix = before.matrix_memory.data();
      for (int64_t c = 0; c < side.count; ++c, matrix += before.stride) {
        const T a = coefficients[c];
        if (a == 0 && !more) continue;
        V sum = {};
        for (int64_t d = 0; d < before.stride; d += kLanes) {
          sum += at<T, kBytes>(matrix + d) * at<T, kBytes>(point_.data() + d);
        }
        next_.data()[c] =
            pass(side, c, first + side.index[c], a, sum_lanes<T, kBytes>(sum), weight);
      }
      std::fill(next_.data() + side.count, next_.data() + side.stride, T(0));
      next_.data()[side.count] = 1;
      std::swap(point_, next_);
      first += this->args_.maps[j - 1].out;
    }
  }

  // The value of column c after its line, and the derivatives in what the line is made of.
  PREPARED_HD T pass(Side<T>& side, int64_t c, int64_t h, T a, T z, T weight) {
    const T low = side.before.lower[c], high = side.before.upper[c];
    if (low >= 0) return z;
    if (a > 0) {
      gradient_[h] += weight * a * z;
      return side.slope.lower[c] * z;
    }
    const T width = high - low, slope = side.slope.upper[c], rise = weight * a / (width * width);
    to_upper_[h] -= rise * (z - low) * low;
    to_lower_[h] += rise * (z - low) * high - weight * a * slope;
    return slope * (z - low);
  }

  PREPARED_HD void corner(const typename Base::Record& record, int64_t row) {
    Side<T>& inputs = *this->sides_[0];
    const T* const coefficients = this->arena_.data() + record.at[0] + row * inputs.stride;
    T* const x = point_.data();
    for (int64_t c = 0; c < inputs.count; ++c) {
      x[c] = coefficients[c] > 0 ? inputs.offset.lower[c] : inputs.offset.upper[c];
    }
    std::fill(x + inputs.count, x + inputs.stride, T(0));
    x[inputs.count] = 1;
  }

  const ChainSlopesArgs<T>& search_;
  std::vector<T> work_, best_slopes_, gradient_, first_, second_;
  std::vector<T> to_lower_, to_upper_;  // derivatives in the intervals of hidden neurons
  Buffer<T> point_, next_;
};

}  // namespace torch_prepared
