// Tensor wrapper of row_program, for any backend.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "../ops/row_program.h"

namespace torch_prepared {

inline void check_program(bool good, const char* argument, const std::string& expected) {
  if (!good) fail("row_program", argument, expected, "a program that breaks this");
}

inline const int64_t* integers(const char* argument, Tensor& tensor, int64_t columns) {
  const bool good = tensor.scalar_type() == ScalarType::Long && tensor.is_cpu() &&
                    tensor.dim() == (columns > 0 ? 2 : 1) &&
                    (columns == 0 || tensor.size(1) == columns);
  if (!good) {
    const std::string shape = columns > 0 ? "(any, " + std::to_string(columns) + ")" : "(any)";
    fail("row_program", argument, "int64 " + shape + " on the CPU", describe(tensor));
  }
  tensor = dense(tensor);
  return tensor.const_data_ptr<int64_t>();
}

inline std::vector<RowSlot> read_slots(Tensor& slots) {
  const int64_t* numbers = integers("slots", slots, 3);
  std::vector<RowSlot> found;
  for (int64_t i = 0; i < slots.size(0); ++i, numbers += 3) {
    found.push_back({numbers[0], numbers[1], numbers[2]});
    const bool small = found.back().size() < (int64_t{1} << 31);
    check_program(numbers[0] > 0 && numbers[1] > 0 && numbers[2] > 0 && small, "slots",
                  "positive sizes of fewer than 2^31 numbers in all");
  }
  check_program(!found.empty(), "slots", "at least one");
  return found;
}

// Whether a convolution's geometry and the size of its weight fit its slots.
inline void check_conv(const RowStep& step, const RowSlot& from, const RowSlot& to,
                       const Tensor& weight) {
  bool good = step.groups > 0 && from.channels % step.groups == 0 && to.channels % step.groups == 0;
  for (int a = 0; a < 2; ++a) {
    good = good && step.kernel[a] > 0 && step.stride[a] > 0 && step.dilation[a] > 0;
  }
  check_program(good, "steps", "positive kernels, strides and groups that divide the channels");
  const int64_t taps = step.kernel[0] * step.kernel[1];
  check_program(weight.numel() == taps * from.channels * (to.channels / step.groups), "tensors",
                "a weight (kernel, outputs, inputs / groups)");
}

inline void check_step(const RowStep& step, const std::vector<RowSlot>& slots,
                       const std::vector<Tensor>& tensors, const std::vector<Tensor>& lines,
                       const std::vector<Tensor>& boxes) {
  const auto within = [](int64_t i, size_t n) { return i >= 0 && i < static_cast<int64_t>(n); };
  check_program(within(step.source, slots.size()) && within(step.target, slots.size()), "steps",
                "slots that exist");
  check_program(step.wanted < static_cast<int64_t>(lines.size()), "steps", "lines that exist");
  const RowSlot &from = slots[step.source], &to = slots[step.target];
  const bool same =
      from.height == to.height && from.width == to.width && from.channels == to.channels;
  switch (step.kind) {
    case StepKind::kConv:
      check_program(within(step.data, tensors.size()), "steps", "tensors that exist");
      check_program(step.source != step.target, "steps", "two slots for a map");
      return check_conv(step, from, to, tensors[step.data]);
    case StepKind::kLinear:
      check_program(within(step.data, tensors.size()) && step.source != step.target, "steps",
                    "tensors that exist and two slots for a map");
      return check_program(tensors[step.data].numel() == from.size() * to.size(), "tensors",
                           "a weight (outputs, inputs)");
    case StepKind::kDot:
    case StepKind::kScale:
      return check_program(
          within(step.data, tensors.size()) && tensors[step.data].numel() == from.size(), "tensors",
          "one number per entry of the slot");
    case StepKind::kRelax:
      return check_program(
          same && within(step.data, lines.size()) && lines[step.data].size(2) == from.size(),
          "lines", "one line per entry of the slot");
    case StepKind::kAdd:
      return check_program(same && step.source != step.target, "steps", "two slots of one shape");
    case StepKind::kCut:
      return check_program(
          within(step.data, boxes.size()) && boxes[step.data].size(2) == from.size(), "boxes",
          "one interval per entry of the slot");
  }
  check_program(false, "steps", "known kinds");
}

inline std::vector<RowStep> read_steps(Tensor& steps) {
  const int64_t* n = integers("steps", steps, kStepNumbers);
  std::vector<RowStep> found;
  for (int64_t i = 0; i < steps.size(0); ++i, n += kStepNumbers) {
    check_program(n[0] >= 0 && n[0] <= static_cast<int64_t>(StepKind::kCut) && n[3] >= 0 &&
                      n[3] <= static_cast<int64_t>(WriteMode::kOnly),
                  "steps", "known kinds and modes");
    found.push_back({static_cast<StepKind>(n[0]),
                     n[1],
                     n[2],
                     static_cast<WriteMode>(n[3]),
                     n[4],
                     n[5],
                     n[6],
                     {n[7], n[8]},
                     {n[9], n[10]},
                     {n[11], n[12]},
                     {n[13], n[14]},
                     n[15]});
  }
  return found;
}

inline void check_index(const int64_t* starts, int64_t regions, const int64_t* index,
                        int64_t indexed, int64_t size) {
  check_program(starts[0] == 0 && starts[regions] == indexed, "starts", "0 .. length of index");
  for (int64_t r = 0; r < regions; ++r) {
    check_program(starts[r] <= starts[r + 1], "starts", "increasing numbers");
    for (int64_t i = starts[r]; i < starts[r + 1]; ++i) {
      const bool after = i == starts[r] || index[i] > index[i - 1];
      check_program(after && index[i] >= 0 && index[i] < size, "index",
                    "increasing entries of slot 0 in each region");
    }
  }
}

// The arguments that all operators on programs take, checked and made dense.
struct RowProgramTensors {
  Tensor slots, steps;
  std::vector<Tensor> tensors, lines, boxes;
  Tensor starts, index;
  std::optional<Tensor> rows;
  int64_t input_slot;
  std::vector<Tensor> free;
  std::optional<Tensor> shares, offsets;

  std::vector<RowSlot> shapes = {};
  std::vector<RowStep> program = {};

  const Tensor& like() const { return boxes[0]; }
  int64_t regions() const { return like().size(1); }
  int64_t count() const { return rows.has_value() ? rows->size(1) : 0; }
  int64_t inputs() const { return input_slot < 0 ? 0 : shapes[input_slot].size(); }
  bool empty() const { return regions() == 0 || (rows.has_value() ? count() : index.size(0)) == 0; }

  void check_values() {
    const char* op = "row_program";
    check_program(!boxes.empty() && input_slot < static_cast<int64_t>(shapes.size()), "boxes",
                  "at least one, and a known input slot");
    const Tensor first = like();
    check_floating(op, "boxes", first);
    const int64_t b = first.size(1);
    for (Tensor& tensor : boxes) {
      check_like(op, "boxes", tensor, first, {2, b, -1});
      tensor = dense(tensor);
    }
    for (Tensor& tensor : lines) {
      check_like(op, "lines", tensor, first, {4, b, -1});
      tensor = dense(tensor);
    }
    for (Tensor& tensor : tensors) {
      check_like(op, "tensors", tensor, first, {-1});
      tensor = dense(tensor);
    }
    check_program(free.empty() || free.size() == lines.size(), "free", "none, or one per lines");
    for (size_t k = 0; k < free.size(); ++k) {
      check_like(op, "free", free[k], first, {b, lines[k].size(2)});
      free[k] = dense(free[k]);
    }
    check_program(shares.has_value() == offsets.has_value() &&
                      (!shares.has_value() || !free.empty() || lines.empty()),
                  "shares", "offsets and free entries with them");
    if (shares.has_value()) {
      check_like(op, "shares", *shares, first, {-1});
      shares = dense(*shares);
      integers("offsets", *offsets, 0);
    }
    if (rows.has_value()) {
      check_like(op, "rows", *rows, first, {b, -1, shapes[0].size()});
      rows = dense(*rows);
    }
  }

  void check() {
    shapes = read_slots(slots);
    program = read_steps(steps);
    check_values();
    for (const RowStep& step : program) check_step(step, shapes, tensors, lines, boxes);
    for (const RowStep& step : program) {
      check_program(step.wanted < 0 || lines[step.wanted].size(2) == shapes[step.target].size(),
                    "steps", "wanted lines of the target's size");
    }
    const int64_t* first = integers("starts", starts, 0);
    const int64_t* entries = integers("index", index, 0);
    if (rows.has_value()) return;
    check_program(starts.size(0) == regions() + 1, "starts", "one number per region, and one more");
    check_index(first, regions(), entries, index.size(0), shapes[0].size());
  }

  template <class T>
  RowProgramArgs<T> pointers() const {
    RowProgramArgs<T> args = {};
    const int64_t b = regions();
    args.regions = b;
    args.count = count();
    args.slots = shapes;
    args.steps = program;
    args.line_slots.assign(lines.size(), 0);
    for (const RowStep& step : program) {
      if (step.kind == StepKind::kRelax) args.line_slots[step.data] = step.source;
    }
    args.input_slot = input_slot;
    for (const Tensor& tensor : tensors) args.tensors.push_back(tensor.const_data_ptr<T>());
    for (const Tensor& tensor : lines) {
      RowLines<T> one;
      for (int i = 0; i < 4; ++i) {
        one.part[i] = tensor.const_data_ptr<T>() + i * b * tensor.size(2);
      }
      args.lines.push_back(one);
    }
    for (const Tensor& tensor : boxes) {
      const T* data = tensor.const_data_ptr<T>();
      args.boxes.push_back({data, data + b * tensor.size(2)});
    }
    args.starts = starts.const_data_ptr<int64_t>();
    args.index = index.const_data_ptr<int64_t>();
    args.indexed = index.size(0);
    args.rows = rows.has_value() ? rows->const_data_ptr<T>() : nullptr;
    for (const Tensor& tensor : free) args.free.push_back(tensor.const_data_ptr<T>());
    args.shares = shares.has_value() ? shares->const_data_ptr<T>() : nullptr;
    args.offsets = shares.has_value() ? offsets->const_data_ptr<int64_t>() : nullptr;
    args.offset_count = shares.has_value() ? offsets->size(0) : 0;
    args.share_count = shares.has_value() ? shares->numel() : 0;
    return args;
  }
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> row_program(
    Tensor slots, Tensor steps, std::vector<Tensor> tensors, std::vector<Tensor> lines,
    std::vector<Tensor> boxes, Tensor starts, Tensor index, std::optional<Tensor> rows,
    int64_t input_slot, std::vector<Tensor> free, std::optional<Tensor> shares,
    std::optional<Tensor> offsets) {
  RowProgramTensors given = {slots, steps, tensors,    lines, boxes,  starts,
                             index, rows,  input_slot, free,  shares, offsets};
  given.check();
  const Backend backend(given.like());
  const int64_t b = given.regions(), s = given.count();
  const bool dense_rows = given.rows.has_value();
  Tensor lower = dense_rows ? allocate(given.like(), {b, s})
                            : allocate(given.like(), {2, given.index.size(0)});
  Tensor input_rows = allocate(given.like(), {b, s, given.inputs()});
  Tensor constants = allocate(given.like(), {b, s});
  if (given.empty()) return {lower, input_rows, constants};
  with_scalar(given.like(), [&](auto zero) {
    using T = decltype(zero);
    RowProgramArgs<T> args = given.pointers<T>();
    args.lower = lower.mutable_data_ptr<T>();
    args.input_rows = input_rows.mutable_data_ptr<T>();
    args.constants = constants.mutable_data_ptr<T>();
    launch_row_program(args, backend.context());
  });
  return {lower, input_rows, constants};
}

// Gradients of the lines, for every piece of the regions, flat and one after another; of shares.
template <class Backend>
std::tuple<Tensor, Tensor> row_program_grad(Tensor grad_lower, Tensor slots, Tensor steps,
                                            std::vector<Tensor> tensors, std::vector<Tensor> lines,
                                            std::vector<Tensor> boxes, Tensor starts, Tensor index,
                                            std::optional<Tensor> rows, int64_t input_slot,
                                            std::vector<Tensor> free, std::optional<Tensor> shares,
                                            std::optional<Tensor> offsets) {
  RowProgramTensors given = {slots, steps, tensors,    lines, boxes,  starts,
                             index, rows,  input_slot, free,  shares, offsets};
  given.check();
  const int64_t b = given.regions(), s = given.count();
  if (given.rows.has_value()) {
    check_like("row_program_grad", "grad_lower", grad_lower, given.like(), {b, s});
  } else {
    check_like("row_program_grad", "grad_lower", grad_lower, given.like(),
               {2, given.index.size(0)});
  }
  int64_t cuts = 0;
  for (const RowStep& step : given.program) cuts += step.kind == StepKind::kCut;
  check_program(cuts <= 1, "steps", "one cut, of the input, for a gradient");
  const Backend backend(given.like());
  grad_lower = dense(grad_lower);
  const int64_t pieces = b >= 8 ? 1 : 4;
  int64_t total = 0;
  for (const Tensor& tensor : given.lines) total += pieces * tensor.numel();
  Tensor grad_lines = allocate_zeros(given.like(), {total});
  Tensor grad_shares =
      allocate_zeros(given.like(), {given.shares.has_value() ? given.shares->numel() : 0});
  if (given.empty()) return {grad_lines, grad_shares};
  with_scalar(given.like(), [&](auto zero) {
    using T = decltype(zero);
    RowGradientArgs<T> gradient = {};
    gradient.grad_lower = grad_lower.const_data_ptr<T>();
    gradient.pieces = pieces;
    gradient.shares = grad_shares.mutable_data_ptr<T>();
    T* next = grad_lines.mutable_data_ptr<T>();
    for (const Tensor& tensor : given.lines) {
      gradient.lines.push_back(next);
      next += pieces * tensor.numel();
    }
    launch_row_program_grad(given.pointers<T>(), gradient, backend.context());
  });
  return {grad_lines, grad_shares};
}

// Where the shares of each group begin, and shares that give the slopes of `lines`.
template <class Backend>
std::tuple<Tensor, Tensor> row_shares(Tensor slots, Tensor steps, std::vector<Tensor> tensors,
                                      std::vector<Tensor> lines, std::vector<Tensor> boxes,
                                      Tensor starts, Tensor index, std::optional<Tensor> rows,
                                      int64_t input_slot, std::vector<Tensor> free) {
  RowProgramTensors given = {slots, steps, tensors,    lines, boxes,        starts,
                             index, rows,  input_slot, free,  std::nullopt, std::nullopt};
  given.check();
  const Backend backend(given.like());
  check_program(free.size() == lines.size(), "free", "one per lines");
  Tensor shares = allocate(given.like(), {0});
  Tensor offsets = allocate_zeros(given.like(), {1}, ScalarType::Long);
  if (given.empty()) return {offsets, shares};
  with_scalar(given.like(), [&](auto zero) {
    using T = decltype(zero);
    const RowProgramArgs<T> args = given.pointers<T>();
    RowSharesArgs<T> found = {};
    launch_row_shares(args, found, backend.context());
    offsets =
        allocate(given.like(), {static_cast<int64_t>(found.offsets.size())}, ScalarType::Long);
    std::copy(found.offsets.begin(), found.offsets.end(), offsets.mutable_data_ptr<int64_t>());
    shares = allocate(given.like(), {found.offsets.back()});
    found.shares = shares.mutable_data_ptr<T>();
    if (found.offsets.back() > 0) launch_row_shares(args, found, backend.context());
  });
  return {offsets, shares};
}

}  // namespace torch_prepared
