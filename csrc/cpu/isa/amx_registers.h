// AMX's tile registers 0 to 7, all of 16 rows of 64 bytes.
#pragma once

#include "vec.h"

namespace {

struct AmxShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} __attribute__((aligned(64)));

// While a task runs, the tile registers are its own; behind it they are as it found them in any thread: unused, since
// live ones would make every switch between threads save 8 KiB. No destructor does this: its clean-up for exceptions,
// which no task throws, would be this file's one symbol that other files share.
FK_INLINE void amx_acquire() {
  static const AmxShapes shapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}
FK_INLINE void amx_release() { asm volatile("tilerelease" ::: "memory"); }

// The compiler's own intrinsics do not say that they read memory.
template <int Register>
FK_INLINE void amx_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Register) : "memory");
}
template <int Register>
FK_INLINE void amx_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Register) : "memory");
}
template <int Register>
FK_INLINE void amx_clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}
template <int Sums, int A, int B>
FK_INLINE void amx_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

}  // namespace
