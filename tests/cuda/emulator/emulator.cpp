#include "emulator.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "fibers.h"

namespace fk {

Index threadIdx, blockIdx, blockDim;

namespace {

constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

void make(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

struct Lane {
  Fiber fiber;
  enum { kRuns, kAtBarrier, kInCollective, kEnded } state = kRuns;
  // What the warp does together, and this lane's part in it.
  void (*collective)(void* const (&parts)[kWarp]) = nullptr;
  void* part = nullptr;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Block {
  std::vector<std::unique_ptr<Lane>> lanes;
  std::unique_ptr<unsigned char[]> shared;
  const std::function<void()>* kernel = nullptr;
};

Block block;
bool reversed = false;
int64_t most_shared = 163 * 1024;
// Those of an A100.
int64_t processors = 108;
// Of each launch so many blocks run, the last ones.
int64_t most_blocks = INT64_MAX;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s (block %d, thread %d)\n", message, blockIdx.x, threadIdx.x);
  std::abort();
}

Lane& current() { return *block.lanes[threadIdx.x]; }

void pause_lane(Lane& lane) {
  const int own = threadIdx.x;
  lane.fiber.pause();
  threadIdx.x = own;
}

void together(void (*collective)(void* const (&)[kWarp]), void* part) {
  Lane& lane = current();
  lane.state = Lane::kInCollective;
  lane.collective = collective;
  lane.part = part;
  pause_lane(lane);
}

// Runs the lanes of one warp until each waits for other warps or has ended.
void run_warp(int first, int size) {
  for (bool progress = true; progress;) {
    progress = false;
    for (int i = 0; i < size; ++i) {
      threadIdx.x = first + (reversed ? size - 1 - i : i);
      Lane& lane = current();
      if (lane.state != Lane::kRuns) continue;
      if (!lane.fiber.resume()) {
        lane.state = Lane::kEnded;
        if (!lane.open.empty() || !lane.groups.empty()) {
          bool pending = !lane.open.empty();
          for (const auto& group : lane.groups) pending = pending || !group.empty();
          if (pending) fail("a thread ended before its copies");
        }
      }
      progress = true;
    }
    int meeting = 0;
    void* parts[kWarp] = {};
    void (*collective)(void* const(&)[kWarp]) = nullptr;
    for (int i = 0; i < size; ++i) {
      const Lane& lane = *block.lanes[first + i];
      if (lane.state != Lane::kInCollective) continue;
      if (collective && lane.collective != collective) fail("lanes of a warp meet in different instructions");
      collective = lane.collective;
      parts[i] = lane.part;
      ++meeting;
    }
    if (!meeting) continue;
    if (meeting != kWarp) fail("some lanes of a warp are missing from an instruction of all");
    collective(parts);
    for (int i = 0; i < size; ++i) block.lanes[first + i]->state = Lane::kRuns;
    progress = true;
  }
}

void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Lane& lane = *block.lanes[i];
    lane.state = Lane::kRuns;
    lane.groups.clear();
    lane.open.clear();
    lane.fiber.start([](void*) { (*block.kernel)(); }, nullptr);
  }
  for (;;) {
    const int warps = threads / kWarp;
    for (int w = 0; w < warps; ++w) run_warp(kWarp * (reversed ? warps - 1 - w : w), kWarp);
    int waiting = 0, ended = 0;
    for (int i = 0; i < threads; ++i) {
      waiting += block.lanes[i]->state == Lane::kAtBarrier;
      ended += block.lanes[i]->state == Lane::kEnded;
    }
    if (ended == threads) return;
    if (waiting != threads) fail("some threads of a block are missing from a barrier");
    for (int i = 0; i < threads; ++i) block.lanes[i]->state = Lane::kRuns;
  }
}

struct Shuffle {
  float value;
  int from;
  float result;
};

void shuffle(void* const (&parts)[kWarp]) {
  for (int i = 0; i < kWarp; ++i) {
    Shuffle& own = *static_cast<Shuffle*>(parts[i]);
    own.result = static_cast<const Shuffle*>(parts[own.from])->value;
  }
}

struct Matrices {
  const unsigned char* row;
  uint32_t* to;
};

void check_rows(void* const (&parts)[kWarp]) {
  for (void* part : parts)
    if (reinterpret_cast<uintptr_t>(static_cast<Matrices*>(part)->row) % 16) fail("a matrix's row is not aligned");
}

void load_all(void* const (&parts)[kWarp]) {
  check_rows(parts);
  for (int i = 0; i < kWarp; ++i)
    for (int m = 0; m < 4; ++m)
      std::memcpy(&static_cast<Matrices*>(parts[i])->to[m],
                  static_cast<Matrices*>(parts[8 * m + i / 4])->row + i % 4 * 4, 4);
}

void load_all_transposed(void* const (&parts)[kWarp]) {
  check_rows(parts);
  for (int i = 0; i < kWarp; ++i)
    for (int m = 0; m < 4; ++m)
      for (int half = 0; half < 2; ++half)
        std::memcpy(reinterpret_cast<unsigned char*>(&static_cast<Matrices*>(parts[i])->to[m]) + 2 * half,
                    static_cast<Matrices*>(parts[8 * m + i % 4 * 2 + half])->row + i / 4 * 2, 2);
}

struct Product {
  float* to;
  const uint32_t *a, *b;
};

template <class T>
float half_of(uint32_t bits, int half) {
  const uint16_t own = static_cast<uint16_t>(bits >> (16 * half));
  T value;
  std::memcpy(&value, &own, sizeof(value));
  return value;
}

// The nearest fp32 number that is no larger: what tensor cores make of a sum.
float cut(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

// A 16 x 16 times b 16 x 8, by halves of the depth.
template <class T>
void multiply_all(void* const (&parts)[kWarp]) {
  constexpr int kDepth = 16;
  const auto part = [&](int lane) { return static_cast<const Product*>(parts[lane]); };
  float a[16][kDepth], b[8][kDepth];
  for (int k = 0; k < kDepth; ++k) {
    for (int i = 0; i < 16; ++i) a[i][k] = half_of<T>(part(i % 8 * 4 + k % 8 / 2)->a[i / 8 + k / 8 * 2], k % 2);
    for (int j = 0; j < 8; ++j) b[j][k] = half_of<T>(part(j * 4 + k % 8 / 2)->b[k / 8], k % 2);
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float& to = static_cast<Product*>(parts[lane])->to[i];
      for (int half = 0; half < 2; ++half) {
        double sum = to;
        for (int k = half * kDepth / 2; k < (half + 1) * kDepth / 2; ++k) sum += double{a[row][k]} * b[column][k];
        to = cut(sum);
      }
    }
}

// A device that was given a negative number does not work.
const char* told(int64_t number, int64_t* to) {
  *to = number;
  return number < 0 ? "the emulated device does not work" : nullptr;
}

}  // namespace

const char* shared_memory_of_device(int64_t* to) { return told(most_shared, to); }
const char* multiprocessors_of_device(int64_t* to) { return told(processors, to); }

unsigned char* shared_memory() { return block.shared.get(); }

void __syncthreads() {
  Lane& lane = current();
  lane.state = Lane::kAtBarrier;
  pause_lane(lane);
}

void __syncwarp() {
  together([](void* const(&)[kWarp]) {}, nullptr);
}

float __shfl_sync(unsigned mask, float value, int lane) {
  if (mask != ~0u || lane < 0 || lane >= kWarp) fail("only shuffles of a whole warp are emulated");
  Shuffle part = {value, lane, 0.0f};
  together(shuffle, &part);
  return part.result;
}

float __shfl_xor_sync(unsigned mask, float value, int step) {
  return __shfl_sync(mask, value, threadIdx.x % kWarp ^ step);
}

void load_matrices(uint32_t (&to)[4], const void* row) {
  Matrices part = {static_cast<const unsigned char*>(row), to};
  together(load_all, &part);
}

void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  Matrices part = {static_cast<const unsigned char*>(row), to};
  together(load_all_transposed, &part);
}

void multiply_bf16(float (&to)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product part = {to, a, b};
  together(multiply_all<bf16>, &part);
}

void multiply_f16(float (&to)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product part = {to, a, b};
  together(multiply_all<f16>, &part);
}

void copy_16(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
    fail("a copy of 16 bytes is not aligned");
  const Copy copy = {to, from, valid};
  if (reversed)
    current().open.push_back(copy);
  else
    make(copy);
}

void end_copies() {
  Lane& lane = current();
  lane.groups.push_back(std::move(lane.open));
  lane.open.clear();
}

void wait_for_copies(int left) {
  Lane& lane = current();
  while (lane.groups.size() > static_cast<size_t>(left)) {
    for (const Copy& copy : lane.groups.front()) make(copy);
    lane.groups.erase(lane.groups.begin());
  }
}

void run_grid(int64_t blocks, int threads, int64_t shared, const std::function<void()>& kernel) {
  if (threads % kWarp) fail("a block is whole warps");
  if (shared > most_shared) fail("more shared memory than a block has");
  while (block.lanes.size() < static_cast<size_t>(threads)) block.lanes.push_back(std::make_unique<Lane>());
  block.kernel = &kernel;
  blockDim.x = threads;
  for (int64_t i = max(blocks - most_blocks, int64_t{0}); i < blocks; ++i) {
    blockIdx.x = static_cast<int>(i);
    block.shared.reset(new unsigned char[shared]);
    std::memset(block.shared.get(), 0xff, shared);
    run_block(threads);
  }
  block.shared.reset();
}

}  // namespace fk

extern "C" __attribute__((visibility("default"))) void fk_emulator_reverse(int wanted) { fk::reversed = wanted != 0; }
extern "C" __attribute__((visibility("default"))) void fk_emulator_shared_memory(int bytes) { fk::most_shared = bytes; }
extern "C" __attribute__((visibility("default"))) void fk_emulator_blocks(int64_t count) { fk::most_blocks = count; }
extern "C" __attribute__((visibility("default"))) void fk_emulator_processors(int count) { fk::processors = count; }
