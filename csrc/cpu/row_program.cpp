// CPU kernel of row_program: groups of rows are shared among threads.
#include "../wrappers/row_program.h"

#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "backend.h"
#include "row_adjoint.h"
#include "vector_jobs.h"

namespace torch_prepared {
namespace {

enum class Task { kBound, kGradient, kShares };

// A share of the groups; for gradients, one piece of one region's groups after another.
template <class T>
struct Job {
  Task task;
  const RowProgramArgs<T>& args;
  const std::vector<RowGroup>& groups;
  int64_t begin, end;
  RowGradientArgs<T>* gradient = nullptr;
  RowSharesArgs<T>* shares = nullptr;
  const std::vector<int64_t>* region_starts = nullptr;  // in groups

  template <int kBytes>
  PREPARED_HD void run() const;
};

// Calls f with the pass that suits a group: two vectors to an entry where there are rows to fill
// them, else one.
template <class Wide, class Narrow, class T, class F>
PREPARED_HD void with_width(const Job<T>& job, const RowGroup& group, Wide& wide, Narrow& narrow,
                            const F& f) {
  const int64_t rows_each = job.args.rows == nullptr ? 2 : 1;
  if (group.count * rows_each > Narrow::kRows) {
    f(wide);
  } else {
    f(narrow);
  }
}

template <class T>
const T* shares_of(const RowProgramArgs<T>& args, int64_t group) {
  return args.shares == nullptr ? nullptr : args.shares + args.offsets[group];
}

template <class T, int kBytes>
PREPARED_HD void run_bounds(const Job<T>& job) {
  LaneWorkspace<T> memory(job.args, LanePass<T, kBytes, 2>::kRows);
  LanePass<T, kBytes, 2> wide(job.args, memory);
  LanePass<T, kBytes, 1> narrow(job.args, memory);
  for (int64_t i = job.begin; i < job.end; ++i) {
    const RowGroup& group = job.groups[i];
    with_width(job, group, wide, narrow, [&](auto& pass) PREPARED_INLINE {
      if (job.task == Task::kBound) {
        pass.run(group, shares_of(job.args, i));
      } else if (job.shares->shares == nullptr) {
        job.shares->offsets[i + 1] = pass.start_shares(group, nullptr);
      } else {
        pass.start_shares(group, job.shares->shares + job.shares->offsets[i]);
      }
    });
  }
}

template <class T, int kBytes>
PREPARED_HD void run_gradients(const Job<T>& job) {
  LaneWorkspace<T> memory(job.args, LanePass<T, kBytes, 2>::kRows);
  memory.reserve_gradient(job.args, LanePass<T, kBytes, 2>::kRows);
  LaneAdjoint<T, kBytes, 2> wide(job.args, memory);
  LaneAdjoint<T, kBytes, 1> narrow(job.args, memory);
  const int64_t pieces = job.gradient->pieces;
  for (int64_t item = job.begin; item < job.end; ++item) {
    const int64_t region = item / pieces, piece = item % pieces;
    const int64_t first = (*job.region_starts)[region], last = (*job.region_starts)[region + 1];
    const int64_t each = (last - first + pieces - 1) / pieces;
    for (int64_t i = first + piece * each; i < std::min(first + (piece + 1) * each, last); ++i) {
      const RowGroup& group = job.groups[i];
      T* const grad =
          job.args.shares == nullptr ? nullptr : job.gradient->shares + job.args.offsets[i];
      with_width(job, group, wide, narrow, [&](auto& pass) PREPARED_INLINE {
        pass.run(group, shares_of(job.args, i), *job.gradient, piece, grad);
      });
    }
  }
}

template <class T>
template <int kBytes>
PREPARED_HD void Job<T>::run() const {
  if (task == Task::kGradient) {
    run_gradients<T, kBytes>(*this);
  } else {
    run_bounds<T, kBytes>(*this);
  }
}

// Neighbors in the index share a group. One that is nearly full ends with its row of pixels: the
// next row's would widen its window.
template <class T>
std::vector<RowGroup> group_neurons(const RowProgramArgs<T>& args, int64_t limit) {
  std::vector<RowGroup> groups;
  const RowSlot& shape = args.slots[0];
  const int64_t line = shape.width * shape.channels;
  for (int64_t r = 0; r < args.regions; ++r) {
    int64_t first = args.starts[r];
    for (int64_t i = first; i < args.starts[r + 1]; ++i) {
      const int64_t count = i + 1 - first;
      const bool last = i + 1 == args.starts[r + 1];
      const bool wraps = !last && args.index[i + 1] / line != args.index[i] / line;
      if (last || count == limit || (wraps && 4 * count >= 3 * limit)) {
        groups.push_back({r, first, count});
        first = i + 1;
      }
    }
  }
  return groups;
}

template <class T>
std::vector<RowGroup> group_rows_of_regions(const RowProgramArgs<T>& args, int64_t limit) {
  std::vector<RowGroup> groups;
  for (int64_t r = 0; r < args.regions; ++r) {
    for (int64_t first = 0; first < args.count; first += limit) {
      groups.push_back({r, first, std::min(limit, args.count - first)});
    }
  }
  return groups;
}

template <int kBytes, class T>
void run_all(const Job<T>& job) {
  constexpr int64_t kRows = LanePass<T, kBytes, 2>::kRows;
  const RowProgramArgs<T>& args = job.args;
  const std::vector<RowGroup> groups =
      args.rows == nullptr ? group_neurons(args, kRows / 2) : group_rows_of_regions(args, kRows);
  const auto count = static_cast<int64_t>(groups.size());
  if (args.shares != nullptr && (args.offset_count != count + 1 || args.offsets[0] != 0 ||
                                 args.offsets[count] != args.share_count)) {
    throw std::runtime_error("row_program: argument 'offsets': expected those of row_shares");
  }
  std::vector<int64_t> region_starts(static_cast<size_t>(args.regions + 1), 0);
  for (const RowGroup& group : groups) ++region_starts[group.region + 1];
  for (int64_t r = 0; r < args.regions; ++r) region_starts[r + 1] += region_starts[r];
  const bool gradient = job.task == Task::kGradient;
  if (job.shares != nullptr && job.shares->shares == nullptr) {
    job.shares->offsets.assign(static_cast<size_t>(count + 1), 0);
  }
  const int64_t items = gradient ? args.regions * job.gradient->pieces : count;
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    run_job<kBytes>(
        Job<T>{job.task, args, groups, begin, end, job.gradient, job.shares, &region_starts});
  });
  if (job.shares != nullptr && job.shares->shares == nullptr) {
    for (int64_t i = 0; i < count; ++i) job.shares->offsets[i + 1] += job.shares->offsets[i];
  }
}

template <class T>
void dispatch(const Job<T>& job) {
  with_vectors([&](auto width) { run_all<decltype(width)::value>(job); });
}

const std::vector<RowGroup> kNoGroups;

}  // namespace

#define PREPARED_DEFINE(T)                                                                         \
  void launch_row_program(const RowProgramArgs<T>& args, CpuContext) {                             \
    dispatch(Job<T>{Task::kBound, args, kNoGroups, 0, 0});                                         \
  }                                                                                                \
  void launch_row_program_grad(const RowProgramArgs<T>& args, RowGradientArgs<T>& g, CpuContext) { \
    dispatch(Job<T>{Task::kGradient, args, kNoGroups, 0, 0, &g});                                  \
  }                                                                                                \
  void launch_row_shares(const RowProgramArgs<T>& args, RowSharesArgs<T>& shares, CpuContext) {    \
    dispatch(Job<T>{Task::kShares, args, kNoGroups, 0, 0, nullptr, &shares});                      \
  }
PREPARED_DEFINE(float)
PREPARED_DEFINE(double)
#undef PREPARED_DEFINE

}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CPU, m) {
  m.impl("row_program", TORCH_BOX(&torch_prepared::row_program<torch_prepared::CpuBackend>));
  m.impl("row_program_grad",
         TORCH_BOX(&torch_prepared::row_program_grad<torch_prepared::CpuBackend>));
  m.impl("row_shares", TORCH_BOX(&torch_prepared::row_shares<torch_prepared::CpuBackend>));
}
