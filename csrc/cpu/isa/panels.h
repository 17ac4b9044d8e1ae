// How the right operand of a product lies in memory.
#pragma once

#include "vec.h"

namespace {

constexpr int kPanel = FK_VL * FK_NV;
// Rows of the tiles of vectors, and of the largest tile there is.
constexpr int kVectorRows = FK_MR, kTileRows = FK_AMX ? 32 : FK_MR;
// Rows of scratch matrices are padded by one cache line, so that power-of-two widths do not fall into one cache set.
constexpr int64_t kRowPad = 16;

// Values of K that one step of the inner loop consumes: bf16 products come in pairs.
template <class A>
constexpr int64_t kStep = sizeof(A) == 2 ? 2 : 1;

// Panels of a matrix: `count` of them, `step` values apart, k values deep, and what will be read behind them; null for
// operands that are in the cache anyway. Perhaps the same in parts, `parts_step` bytes apart. Rows of fp32 may be
// panels as they lie, with `row` values from one to the next.
template <class A>
struct Panels {
  const A* first;
  int64_t step, count, k;
  const A* after;
  const char* parts = nullptr;
  int64_t parts_step = 0;
  int64_t row = kPanel;
};

}  // namespace
