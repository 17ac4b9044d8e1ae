// Products through isa/amx.h against plain loops: of small whole numbers in bf16, which are exact; in fp32 of numbers
// with all their bits, of any size. Every operand ends where its memory does, and what lies between its rows is NaN.
#define FK_VL 16
#define FK_NV 2
#define FK_MR 14
#define FK_NATIVE_BF16 1
#define FK_AMX 1
#include "isa/gemm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <vector>

extern "C" void* fk_block_memory(int64_t bytes) {
  static void* memory = nullptr;
  free(memory);
  memory = aligned_alloc(64, (size_t)round_up(bytes, 64));
  memset(memory, 0xff, (size_t)bytes);
  return memory;
}

namespace {

uint64_t state = 1;
int64_t draw(int64_t low, int64_t high) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return low + (int64_t)((state >> 33) % (uint64_t)(high - low + 1));
}
void draw_value(bf16& value) { from_float(&value, (float)draw(-8, 8)); }
void draw_value(float& value) { value = ldexpf((float)draw(-0xffffff, 0xffffff), (int)draw(-28, -24)); }
void nan_value(bf16& value) { value = 0x7fc0; }
void nan_value(float& value) { value = NAN; }

int in_parts = 0, made_ready = 0, split_ahead = 0, as_they_lie = 0;

// Of a large one not all blocks of A fit into the memory that is meant for them at once.
template <class A, bool Transposed>
bool check(bool large) {
  constexpr int64_t pair = kStep<A>;
  const int64_t rows = large ? draw(150, 180) : draw(1, 200), k = pair * (large ? 1250 : draw(1, 150 / pair));
  const int64_t count = large ? 5 : draw(1, 8), width = draw(1, count * kPanel);
  const int64_t lda = Transposed ? pair * (rows + draw(0, 9)) : k + pair * draw(0, 9);
  // Panels of fp32 may be rows as they lie.
  const bool lies = sizeof(A) == 4 && draw(0, 2) == 0;
  const int64_t ldb = lies ? count * kPanel + draw(0, 20) : kPanel;
  const int64_t step = lies ? kPanel : k * kPanel + 64 * draw(0, 3), ldo = count * kPanel + draw(0, 20);
  const bool accumulate = draw(0, 1), fetches = draw(0, 1), extreme = sizeof(A) == 4 && draw(0, 3) == 0;
  A nan;
  nan_value(nan);
  std::vector<A> a(Transposed ? (k / pair - 1) * lda + pair * rows : (rows - 1) * lda + k, nan);
  std::vector<A> panels((count - 1) * step + (k - 1) * ldb + kPanel, nan);
  const auto a_at = [&](int64_t row, int64_t i) -> A& {
    return Transposed ? a[i / pair * lda + pair * row + i % pair] : a[row * lda + i];
  };
  const auto panel_at = [&](int64_t i, int64_t column) -> A& {
    return panels[column / kPanel * step + i / pair * pair * ldb + pair * (column % kPanel) + i % pair];
  };
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t row = 0; row < rows; ++row) draw_value(a_at(row, i));
    for (int64_t column = 0; column < count * kPanel; ++column) draw_value(panel_at(i, column));
  }
  if constexpr (sizeof(A) == 4)
    if (extreme) {
      a_at(draw(0, rows - 1), draw(0, k - 1)) = INFINITY;
      panel_at(draw(0, k - 1), draw(0, width - 1)) = 3.4e38f;  // as bf16, infinite
      const int64_t small = draw(0, rows - 1), lone = draw(0, rows - 1), at = draw(0, k - 1);
      const int exponent = (int)draw(-118, -90);
      for (int64_t i = 0; i < k; ++i) {
        a_at(small, i) = ldexpf(a_at(small, i), exponent);
        a_at(lone, i) = 0.0f;
      }
      // The product is finite, that of the first parts is not.
      a_at(lone, at) = 3.385e38f;
      for (int64_t column = 0; column < count * kPanel; ++column) panel_at(at, column) = 1.0042f;
    }
  std::vector<float> out((rows - 1) * ldo + count * kPanel);
  for (float& value : out) value = (float)draw(-99, 99);
  const std::vector<float> before = out;
  Panels<A> w = {panels.data(), step, count, k, fetches && !lies ? panels.data() : nullptr};
  w.row = ldb;
  std::unique_ptr<char, void (*)(void*)> parts(nullptr, free);
  if constexpr (sizeof(A) == 4) {
    if (draw(0, 2) == 0) {
      w.parts_step = ceil_div(k, kAmxDepth) * kAmxPanelBlock;
      parts.reset((char*)aligned_alloc(64, (size_t)(count * w.parts_step)));
      w.parts = parts.get();
      for (int64_t n = 0; n < count; ++n)
        amx_panel_blocks(panels.data() + n * step, ldb, k, parts.get() + n * w.parts_step);
    }
    in_parts += amx_pays(w.count, w.k);
    split_ahead += w.parts && amx_pays(w.count, w.k);
    as_they_lie += lies && amx_pays(w.count, w.k);
  }
  amx_acquire();
  const std::unique_ptr<char, void (*)(void*)> memory(
      (char*)aligned_alloc(64, (size_t)max64(64, prepared_bytes<A>(rows, k))), free);
  const char* prepared = !Transposed && draw(0, 1) ? prepare(a.data(), lda, rows, k, count, memory.get()) : nullptr;
  made_ready += prepared != nullptr;
  if (prepared)
    each_tile<false>(a.data(), lda, rows, w, 0, prepared, [&](int64_t n, int64_t row, int64_t, auto run) {
      run(out.data() + row * ldo + n * kPanel, ldo, accumulate, width - n * kPanel);
    });
  else
    products<Transposed>(a.data(), lda, rows, w, out.data(), ldo, kPanel, accumulate, width);
  amx_release();
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < ldo; ++column) {
      const int64_t at = row * ldo + column;
      if (at >= (int64_t)out.size()) break;
      // Of panels that are not wanted, or not whole, the rest may be anything.
      if (column >= width && column < count * kPanel) continue;
      double wanted = accumulate || column >= width ? before[at] : 0.0, size = fabs(wanted);
      for (int64_t i = 0; i < k && column < width; ++i) {
        const double term = (double)to_float(a_at(row, i)) * (double)to_float(panel_at(i, column));
        wanted += term;
        size += fabs(term);
      }
      const double allowed = sizeof(A) == 4 && column < width ? 6e-7 * size : 0.0;
      if (out[at] == (float)wanted || fabs(out[at] - wanted) <= allowed || (isnan(out[at]) && isnan(wanted))) continue;
      printf("%s, rows %d, k %d, %d panels, transposed %d, accumulate %d, width %d: got %g at (%d, %d), expected %g\n",
             sizeof(A) == 4 ? "fp32" : "bf16", (int)rows, (int)k, (int)count, Transposed, accumulate, (int)width,
             out[at], (int)row, (int)column, wanted);
      return false;
    }
  return true;
}

}  // namespace

int main() {
  int done = 0;
  for (; done < 1200; done += 4) {
    const bool large = done < 4;
    if (!check<bf16, false>(large) || !check<bf16, true>(large) || !check<float, false>(large) ||
        !check<float, true>(large))
      return 1;
  }
  const bool some =
      40 < in_parts && in_parts < 500 && 100 < made_ready && made_ready < 500 && 20 < split_ahead && 20 < as_they_lie;
  if (!some) printf("%d, %d, %d, %d\n", in_parts, made_ready, split_ahead, as_they_lie);
  printf("%d products, in parts or prepared: %s\n", done, some ? "some" : "too few or all");
}
