#include "device.h"

namespace fk {

const char* most_shared_memory(int64_t* to) { return shared_memory_of_device(to); }
const char* multiprocessors(int64_t* to) { return multiprocessors_of_device(to); }

}  // namespace fk
