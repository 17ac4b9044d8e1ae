#include "support.h"

#ifndef FK_ONLY_GENERIC
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>

namespace fk {
namespace {

#ifndef FK_ONLY_GENERIC
// AMX's tile registers: whether the processor and the operating system have them, and this process may use them, which
// Linux wants to be asked.
bool tile_registers() {
  constexpr unsigned kProductsOfBf16 = 1u << 22, kTiles = 1u << 24, kSavesRegisters = 1u << 27;
  constexpr unsigned kStates = 3u << 17;  // shapes and contents
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSavesRegisters)) return false;
  unsigned low = 0, high = 0;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kStates) != kStates || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr long kRequestPermission = 0x1023, kContents = 18;
  return (d & kProductsOfBf16) && (d & kTiles) && syscall(SYS_arch_prctl, kRequestPermission, kContents) == 0;
}
#endif

std::vector<const fk_table*> available() {
  std::vector<const fk_table*> tables = {&fk_table_generic};
#ifndef FK_ONLY_GENERIC
  __builtin_cpu_init();  // also asks the operating system which registers it saves
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&fk_table_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      tables.push_back(&fk_table_avx512);
      if (__builtin_cpu_supports("avx512bf16")) {
        tables.push_back(&fk_table_avx512bf16);
        if (tile_registers()) tables.push_back(&fk_table_amx);
      }
    }
  }
#endif
  return tables;
}

const fk_table& choose() {
  const std::vector<const fk_table*> tables = available();
  const char* wanted = std::getenv("FASTVIT_CPU_ISA");
  if (wanted && *wanted)
    for (const fk_table* table : tables)
      if (!std::strcmp(table->name, wanted)) return *table;
  return *tables.back();
}

fk_array array(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  const fk_dtype dtype = kernel_dtype(tensor.scalar_type());
  return {data_of(tensor, name), dtype, tensor.numel()};
}

}  // namespace

const fk_table& kernels() {
  static const fk_table& table = choose();
  return table;
}

Arena::~Arena() { std::free(memory_); }

void* Arena::at_least(int64_t bytes) {
  if (bytes > bytes_) {
    std::free(memory_);
    bytes_ = 0;
    memory_ = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
    if (!memory_) throw std::bad_alloc();
    bytes_ = bytes;
  }
  return memory_;
}

void* scratch(int64_t bytes) {
  static thread_local Arena arena;
  return arena.at_least(bytes);
}

extern "C" void* fk_block_memory(int64_t bytes) {
  static thread_local Arena arena;
  return arena.at_least(bytes);
}

fk_dtype kernel_dtype(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "dtype: the CPU kernels take float32 and bfloat16");
  return dtype == ScalarType::Float ? FK_F32 : FK_BF16;
}

fk_activation activation_of(const std::string& name) { return static_cast<fk_activation>(activation_index(name)); }

fk_array view(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a dense row-major tensor");
  return array(tensor, name);
}

fk_array view(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return absent();
  weight_view(tensor, name, shape);
  return view(*tensor, name);
}

fk_array weight_view(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  if (!tensor.has_value()) return absent();
  check_shape(*tensor, name, shape);
  return array(*tensor, name);
}

fk_array rows_view(std::optional<Tensor>* tensor, const char* name, int64_t* stride) {
  const Tensor& t = **tensor;
  STD_TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions");
  const bool rows =
      t.stride(2) == 1 && t.stride(1) >= t.size(2) && (t.size(0) <= 1 || t.stride(0) == t.size(1) * t.stride(1));
  if (!rows) *tensor = torch::stable::contiguous(t);
  *stride = rows ? t.stride(1) : (*tensor)->size(2);
  return array(**tensor, name);
}

void check_bias(const TensorList& tensors, size_t bias, size_t weight, const char* name) {
  STD_TORCH_CHECK(!tensors[bias].has_value() || tensors[weight].has_value(), name,
                  ": expected the weight of its projection beside it");
}

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  int32_t code = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                 : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                 : aoti_torch_dtype_uint8();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

int64_t rows_per_image_task(int64_t images, int64_t rows, int64_t most) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  int64_t tasks = std::max<int64_t>(1, blocks(rows, most));
  // With few tasks a thread without work costs most: round their number up to whole rounds, unless blocks get tiny.
  while (images * tasks < 8 * threads && images * tasks % threads && rows / (tasks + 1) >= 1) ++tasks;
  return std::max<int64_t>(1, blocks(rows, tasks));
}

int64_t rows_per_task(int64_t rows, int64_t most) { return rows_per_image_task(1, rows, most); }

void check_window(int64_t kernel, int64_t stride, int64_t padding, int64_t height, int64_t width,
                  int64_t most_padding) {
  STD_TORCH_CHECK(kernel > 0 && stride > 0 && stride <= kMostSize && padding >= 0 && padding <= most_padding &&
                      height <= kMostSize && width <= kMostSize && kernel <= height + 2 * padding &&
                      kernel <= width + 2 * padding,
                  "stride, padding: do not go with the map");
}

ScalarType promoted(ScalarType dtype, const std::optional<Tensor>& residual) {
  kernel_dtype(dtype);  // a residual in fp32 must not hide another
  return residual.has_value() && residual->scalar_type() == ScalarType::Float ? ScalarType::Float : dtype;
}

void check_same_shape(const Tensor& tensor, const Tensor& other, const char* name) {
  const auto a = tensor.sizes(), b = other.sizes();
  STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), name, ": unexpected shape");
}

}  // namespace fk
