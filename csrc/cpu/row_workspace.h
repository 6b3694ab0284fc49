// What the rows of a group occupy: entries of slots, windows of pixels, and a thread's memory.
#pragma once

#include <algorithm>
#include <vector>

#include "../ops/row_program.h"
#include "chain_workspace.h"

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
  std::vector<Buffer<T>> values;    // by slot
  std::vector<OwnedLists> full;     // by slot: every entry
  std::vector<OwnedLists> kept;     // by lines: entries that are not constantly zero
  std::vector<Buffer<T>> saved;     // by lines: rows before they went through, for gradients
  std::vector<Buffer<T>> adjoints;  // by slot, for gradients
  OwnedLists seeds;
};

}  // namespace torch_prepared
