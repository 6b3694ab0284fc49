// How rows (b, s, n) share coefficients (B, S, n), B in {1, b}, S in {1, s}.
#pragma once

#include <stdint.h>

#include "config.h"

namespace torch_prepared {

// Rows are cut into `groups` of `members` that read the same n coefficients: member m of group g
// is row g * group_stride + m * member_stride and reads coefficients [g n, (g + 1) n).
struct RowGroups {
  int64_t groups, members, group_stride, member_stride, size;

  PREPARED_HD int64_t rows() const { return groups * members; }
  PREPARED_HD int64_t row(int64_t g, int64_t m) const {
    return g * group_stride + m * member_stride;
  }
};

inline RowGroups group_rows(int64_t b, int64_t s, int64_t n, int64_t B, int64_t S) {
  if (B == b && S == s) return {b * s, 1, 1, 1, n};
  if (B == 1 && S == 1) return {1, b * s, 0, 1, n};
  if (S == 1) return {b, s, s, 1, n};
  return {s, b, 1, s, n};
}

// Number of pieces the members of each group are cut into for a deterministic two-stage sum.
inline int64_t count_pieces(const RowGroups& rows, int64_t rows_per_piece) {
  return rows.members == 0 ? 1 : (rows.members + rows_per_piece - 1) / rows_per_piece;
}

}  // namespace torch_prepared
