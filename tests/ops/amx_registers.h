// csrc/cpu/isa/amx_registers.h in plain C++: what the instructions read and write, the sanitizers see.
#pragma once

#include <string.h>

#include "isa/vec.h"

namespace {

static char amx_registers[8][16][64];
static int amx_users = 0;

void amx_acquire() { ++amx_users; }
void amx_release() { --amx_users; }

template <int Register>
void amx_load(const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) memcpy(amx_registers[Register][row], (const char*)from + row * stride, 64);
}
template <int Register>
void amx_store(void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) memcpy((char*)to + row * stride, amx_registers[Register][row], 64);
}
template <int Register>
void amx_clear() {
  memset(amx_registers[Register], 0, sizeof amx_registers[Register]);
}
// Numbers below 2^-126 are taken for zeros. The first numbers of all pairs and the second ones are summed apart from
// what the sum was before (Intel's manual of instructions, TDPBF16PS).
static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f : x; }
template <int Sums, int A, int B>
void amx_multiply() {
  if (!amx_users) __builtin_trap();
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      float sum, halves[2] = {};
      memcpy(&sum, amx_registers[Sums][row] + 4 * column, 4);
      for (int pair = 0; pair < 16; ++pair)
        for (int i = 0; i < 2; ++i) {
          bf16 a, b;
          memcpy(&a, amx_registers[A][row] + 4 * pair + 2 * i, 2);
          memcpy(&b, amx_registers[B][pair] + 4 * column + 2 * i, 2);
          halves[i] = flushed(__builtin_fmaf(flushed(to_float(a)), flushed(to_float(b)), halves[i]));
        }
      sum = flushed(sum + flushed(halves[0] + halves[1]));
      memcpy(amx_registers[Sums][row] + 4 * column, &sum, 4);
    }
}

}  // namespace
