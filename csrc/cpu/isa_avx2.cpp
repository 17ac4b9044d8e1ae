#define FK_VL 8
#define FK_NV 2
#define FK_MR 6
#define FK_NATIVE_BF16 0
#include "isa/table.h"

FK_TABLE(avx2)
