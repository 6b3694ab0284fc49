// row_program: the steps of one backward pass over a general graph, and launchers.
#pragma once

#include <stdint.h>

#include <vector>

#include "../common/context.h"

namespace torch_prepared {

// What rows on one value look like: `channels` numbers at each of height x width pixels, in this
// order (pixels outside, channels inside).
struct RowSlot {
  int64_t height, width, channels;

  int64_t pixels() const { return height * width; }
  int64_t size() const { return pixels() * channels; }
};

enum class StepKind : int64_t {
  kConv,    // target (+)= transpose of a convolution, applied to source
  kLinear,  // target (+)= source @ weight
  kRelax,   // target (+)= source through lines
  kDot,     // constant += source . vector
  kAdd,     // target (+)= sign * source
  kScale,   // source *= vector
  kCut,     // best = max(best, constant + minimum of source over a box)
};

enum class WriteMode : int64_t {
  kAdd,    // to what earlier steps wrote
  kFirst,  // of several steps; all of the target gets a number
  kOnly,   // step; what no later step reads need not be written
};

struct RowStep {
  StepKind kind;
  int64_t source, target;
  WriteMode mode;
  int64_t wanted;  // lines that the target goes through next, unread elsewhere; or -1
  int64_t data;    // position of the weight, vector, lines or box in its list
  int64_t sign;
  int64_t kernel[2], stride[2], padding[2], dilation[2], groups;
};

constexpr int64_t kStepNumbers = 16;

// Lines of one activation for every region: slope and offset below, then above; each (b, size).
template <class T>
struct RowLines {
  const T* part[4];
};

template <class T>
struct RowBox {
  const T* center;  // (b, size)
  const T* radius;
};

// Rows come in one of two forms: `index`, positions in slot 0, of which starts[i] .. starts[i + 1]
// belong to region i and of which each is bounded from below and above; or `rows`, dense.
template <class T>
struct RowProgramArgs {
  int64_t regions, count;  // count: rows of each region in the dense form
  std::vector<RowSlot> slots;
  std::vector<RowStep> steps;
  std::vector<const T*> tensors;
  std::vector<RowLines<T>> lines;
  std::vector<int64_t> line_slots;  // the slot whose entries each element of `lines` describes
  std::vector<RowBox<T>> boxes;
  int64_t input_slot;  // -1 when the target does not depend on the input
  const int64_t* starts;
  const int64_t* index;
  int64_t indexed;  // length of index
  const T* rows;    // (regions, count, size of slot 0), or null
  T* lower;         // (2, indexed) or (regions, count)
  T* input_rows;    // (regions, count, size of the input slot), dense form only
  T* constants;     // (regions, count), dense form only

  // Slopes of each row's own, or null. Where free[k][e] = 1 - a is not zero and the line above has
  // an offset, the line below has slope 1 - free (1 - share) and no offset. Shares lie side by
  // side: group after group (group g's from offsets[g]), line after line, entry after entry.
  std::vector<const T*> free;  // by lines, (b, size); empty when there are no shares
  const T* shares;
  const int64_t* offsets;
  int64_t offset_count, share_count;
};

// Gradient of sum(grad_lower * lower) in lines and shares; the program has one cut, of the input.
template <class T>
struct RowGradientArgs {
  const T* grad_lower;
  std::vector<T*> lines;  // (pieces, 4, b, size) each, all zero
  T* shares;
  int64_t pieces;  // of each region, summed apart and then in order
};

// What shares a program needs: `offsets` of groups + 1 numbers, then their values at the start.
template <class T>
struct RowSharesArgs {
  std::vector<int64_t> offsets;
  T* shares;  // null: count only
};

#define PREPARED_DECLARE(T)                                                                \
  void launch_row_program(const RowProgramArgs<T>&, CpuContext);                           \
  void launch_row_program_grad(const RowProgramArgs<T>&, RowGradientArgs<T>&, CpuContext); \
  void launch_row_shares(const RowProgramArgs<T>&, RowSharesArgs<T>&, CpuContext)
PREPARED_DECLARE(float);
PREPARED_DECLARE(double);
#undef PREPARED_DECLARE

}  // namespace torch_prepared
