#include "device.h"

namespace fk {

int64_t most_shared_memory() { return shared_memory_of_device(); }
int64_t multiprocessors() { return multiprocessors_of_device(); }

}  // namespace fk
