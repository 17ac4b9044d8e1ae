#define FK_VL 16
#define FK_NV 2
#define FK_MR 14
#define FK_NATIVE_BF16 1
#define FK_AMX 1
#include "isa/table.h"

FK_TABLE(amx)
