// Large pages: memory that is read from end to end at every call then takes fewer address translations.
#pragma once

#include "support.h"

namespace fk {

constexpr int64_t kLargePage = int64_t{2} << 20;

// Where the first large page behind `address` begins.
char* large_page(char* address);

// Advice only: without large pages nothing changes. To be given before the memory is written for the first time.
void prefer_large_pages(char* block, int64_t bytes);

// Forgets the shelf that `fastvit::shelve` is filling; it goes with the last block on it. How many bytes it has.
int64_t release_shelf();

}  // namespace fk
