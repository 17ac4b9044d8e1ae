// Products of small whole numbers through isa/amx.h against plain loops. Every operand ends where its memory does, and
// what lies between its rows is NaN.
#define FK_VL 16
#define FK_NV 2
#define FK_MR 14
#define FK_NATIVE_BF16 1
#define FK_AMX 1
#include "isa/gemm.h"

#include <stdio.h>
#include <stdlib.h>

#include <vector>

extern "C" void* fk_block_memory(int64_t bytes) {
  static void* memory = nullptr;
  free(memory);
  memory = aligned_alloc(64, (size_t)bytes);
  memset(memory, 0xff, (size_t)bytes);
  return memory;
}

namespace {

constexpr bf16 kNan = 0x7fc0;

uint64_t state = 1;
int64_t draw(int64_t low, int64_t high) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return low + (int64_t)((state >> 33) % (uint64_t)(high - low + 1));
}
bf16 whole_number() {
  bf16 value;
  from_float(&value, (float)draw(-8, 8));
  return value;
}

template <bool Transposed>
bool check() {
  const int64_t rows = draw(1, 70), k = 2 * draw(1, 75), count = draw(1, 5), width = draw(1, count * kPanel);
  const int64_t lda = Transposed ? 2 * (rows + draw(0, 9)) : k + 2 * draw(0, 9);
  const int64_t step = k * kPanel + 64 * draw(0, 3), ldo = count * kPanel + draw(0, 20);
  const bool accumulate = draw(0, 1), fetches = draw(0, 1);
  std::vector<bf16> a(Transposed ? (k / 2 - 1) * lda + 2 * rows : (rows - 1) * lda + k, kNan);
  std::vector<bf16> panels((count - 1) * step + k * kPanel, kNan);
  const auto a_at = [&](int64_t row, int64_t i) -> bf16& {
    return Transposed ? a[i / 2 * lda + 2 * row + i % 2] : a[row * lda + i];
  };
  const auto panel_at = [&](int64_t i, int64_t column) -> bf16& {
    return panels[column / kPanel * step + i / 2 * 2 * kPanel + 2 * (column % kPanel) + i % 2];
  };
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t row = 0; row < rows; ++row) a_at(row, i) = whole_number();
    for (int64_t column = 0; column < count * kPanel; ++column) panel_at(i, column) = whole_number();
  }
  std::vector<float> out((rows - 1) * ldo + count * kPanel);
  for (float& value : out) value = (float)draw(-99, 99);
  const std::vector<float> before = out;
  const Panels<bf16> w = {panels.data(), step, count, k, fetches ? panels.data() : nullptr};
  amx_acquire();
  products<Transposed>(a.data(), lda, rows, w, out.data(), ldo, kPanel, accumulate, width);
  amx_release();
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < ldo; ++column) {
      const int64_t at = row * ldo + column;
      if (at >= (int64_t)out.size()) break;
      // Of panels that are not wanted, or not whole, the rest may be anything.
      if (column >= width && column < count * kPanel) continue;
      float wanted = accumulate || column >= width ? before[at] : 0.0f;
      for (int64_t i = 0; i < k && column < width; ++i)
        wanted += to_float(a_at(row, i)) * to_float(panel_at(i, column));
      if (out[at] == wanted) continue;
      printf("rows %d, k %d, %d panels, transposed %d, accumulate %d, width %d: got %g at (%d, %d), expected %g\n",
             (int)rows, (int)k, (int)count, Transposed, accumulate, (int)width, out[at], (int)row, (int)column, wanted);
      return false;
    }
  return true;
}

}  // namespace

int main() {
  int done = 0;
  for (; done < 600; done += 2)
    if (!check<false>() || !check<true>()) return 1;
  printf("%d products\n", done);
}
