// The only file that asks torch for CUDA.
#include "support.h"

// A torch without CUDA lacks this function; the library is loaded there as well.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fk {

Stream::Stream(const Tensor& tensor) : guard_(nullptr), stream_(nullptr) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this PyTorch was built without CUDA");
  const int32_t device = tensor.get_device_index();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
  // Last: nobody would delete the guard of a constructor that fails.
  DeviceGuardHandle guard;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &guard));
  guard_ = guard;
}

Stream::~Stream() {
  if (guard_) aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_));
}

bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

}  // namespace fk
