// What this machine can do, measured with the code the kernels are made of.

#include <chrono>
#include <cstring>

#include "support.h"

namespace fk {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string isa() { return kernels().name; }

// GFLOP/s of multiply-adds from registers, all threads together, for about `seconds`.
double peak(std::string kind, double seconds) {
  STD_TORCH_CHECK(kind == "fp32" || kind == "bf16", "kind: expected fp32 or bf16");
  STD_TORCH_CHECK(seconds > 0.0 && seconds <= 60.0, "seconds: expected more than 0 and at most 60");
  const int32_t low_precision = kind == "bf16";
  const int64_t workers = torch::stable::get_num_threads();
  double best = 0.0;
  for (const auto start = Clock::now(); since(start) < seconds;) {
    std::atomic<int64_t> operations{0};
    const auto round = Clock::now();
    torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      double done = 0.0;
      for (int64_t i = first; i < last; ++i) done += kernels().peak(low_precision, 4000000);
      operations += static_cast<int64_t>(done);
    });
    best = std::max(best, static_cast<double>(operations.load()) / since(round) * 1e-9);
  }
  return best;
}

// GB/s read plus written by a copy of arrays far larger than the caches, all threads together.
double bandwidth(double seconds) {
  STD_TORCH_CHECK(seconds > 0.0 && seconds <= 60.0, "seconds: expected more than 0 and at most 60");
  constexpr int64_t kBytes = int64_t{256} << 20;
  Tensor from = empty({kBytes}, ScalarType::Byte), to = empty({kBytes}, ScalarType::Byte);
  char* source = static_cast<char*>(from.mutable_data_ptr());
  char* target = static_cast<char*>(to.mutable_data_ptr());
  std::memset(source, 1, kBytes);
  std::memset(target, 0, kBytes);
  const int64_t workers = torch::stable::get_num_threads();
  double best = 0.0;
  for (const auto start = Clock::now(); since(start) < seconds;) {
    const auto round = Clock::now();
    torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = kBytes / workers * i, end = i + 1 == workers ? kBytes : kBytes / workers * (i + 1);
        std::memcpy(target + begin, source + begin, static_cast<size_t>(end - begin));
      }
    });
    best = std::max(best, 2.0 * static_cast<double>(kBytes) / since(round) * 1e-9);
  }
  return best;
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fk::isa));
  m.impl("cpu_peak", TORCH_BOX(&fk::peak));
  m.impl("cpu_bandwidth", TORCH_BOX(&fk::bandwidth));
}
