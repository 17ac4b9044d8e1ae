// How a projection is divided among blocks: by what these read and multiply, for every GPU alike. No torch, no CUDA.
#include <algorithm>
#include <optional>

#include "params.h"

namespace fk {
namespace {

int32_t parts(int32_t size, int32_t part) { return (size + part - 1) / part; }

// What a multiprocessor of a GPU that this is for does in the time in which it reads one byte from the L2 cache.
constexpr double kProductsPerByte = 64.0, kFp32ProductsPerByte = 6.0;
// What a block costs besides, in such bytes: it fills its pipelines and waits at barriers.
constexpr double kBytesOfBlock = 32 * 1024;
// A block that is alone on its multiprocessor has nobody to work while it waits.
constexpr double kAlone = 1.5;
constexpr int32_t kSides[] = {16, 14, 12, 10, 8, 7, 6, 4, 2, 1};

void divide(ConvProjection& p, const ProjectionSet& set) {
  for (int32_t i = set.first; i < set.first + set.count; ++i) {
    ProjectionBranch& b = p.branches[i];
    b.tile_height = parts(b.out_height, set.down);
    b.tile_width = parts(b.out_width, set.across);
  }
}

// The time of so many bytes for all samples, when a block's weighs so much.
double time_of(const ConvProjection& p, double sample, double block, double busy) {
  return std::max(sample * p.batch, block * busy);
}

// The cheapest tiles whose blocks find room in `most` bytes of shared memory.
std::optional<ProjectionSet> choose_tiles(ConvProjection& p, ProjectionSet set, int64_t most, double busy,
                                          double& sample, double& block) {
  std::optional<ProjectionSet> best;
  const ProjectionBranch& leading = p.branches[set.first];
  for (const int32_t tall : kSides)
    for (const int32_t wide : kSides) {
      set.down = parts(leading.out_height, tall);
      set.across = parts(leading.out_width, wide);
      divide(p, set);
      double products = 0;
      bool fits = true;
      for (int32_t i = set.first; i < set.first + set.count; ++i) {
        const ProjectionBranch& b = p.branches[i];
        fits = fits && b.tile_height * b.tile_width <= kMostProjected;
        products += double(projected_rows(b)) * b.linear.out * p.channels;
      }
      if (!fits) continue;
      measure_patch(p, set);
      if (shared_bytes(p, set) > most) continue;
      const double work = products / (p.dtype == kF32 ? kFp32ProductsPerByte : kProductsPerByte);
      const double cost = static_cast<double>(read_bytes(p, set)) + work + kBytesOfBlock;
      const double all = cost * set.down * set.across;
      if (best && time_of(p, sample, block, busy) <= time_of(p, all, cost, busy)) continue;
      best = set;
      sample = all;
      block = cost;
    }
  return best;
}

}  // namespace

int64_t read_bytes(const ConvProjection& p, const ProjectionSet& set) {
  const int64_t row = p.channels * size_of(p.dtype);
  const int64_t patch = int64_t{std::min(set.patch_height, p.height)} * std::min(set.patch_width, p.width);
  // Statistics take a pass of their own; that of a single chunk's channels finds x in the L1 cache.
  int64_t rows = patch * (p.norm.kind == kNoNorm || p.channels <= kFilteredChannels ? 1 : 2);
  for (int32_t i = set.first; i < set.first + set.count; ++i) rows += p.branches[i].linear.out;
  return rows * row;
}

void choose_sets(ConvProjection& p, int64_t most, int64_t processors) {
  // A block gets more than its share of the cache's bandwidth while other multiprocessors are idle, but not all of it.
  const double busy = static_cast<double>(processors) / 2;
  constexpr int32_t kCounts[3][3] = {{3, 0, 0}, {1, 2, 0}, {1, 1, 1}};
  // Two blocks on a multiprocessor, or one.
  const int64_t limits[2] = {(most + kReservedShared) / 2 - kReservedShared, most};
  // The smallest blocks, one result of one branch each.
  int32_t sets = 3;
  ProjectionSet best[3];
  for (int32_t i = 0; i < 3; ++i) best[i] = {i, 1, p.branches[i].out_height, p.branches[i].out_width, 0, 0};
  std::optional<double> best_time;
  for (const int64_t limit : limits)
    for (const auto& counts : kCounts) {
      ProjectionSet found[3];
      double all = 0, longest = 0;
      int32_t count = 0;
      for (int32_t first = 0; first < 3; ++count) {
        double sample = 0, block = 0;
        const auto set = choose_tiles(p, {first, counts[count], 1, 1, 0, 0}, limit, busy, sample, block);
        if (!set) break;
        found[count] = *set;
        first += counts[count];
        all += sample;
        longest = std::max(longest, block);
        if (first == 3) {
          const double time = time_of(p, all, longest, busy) * (limit == most ? kAlone : 1.0);
          if (best_time && *best_time <= time) break;
          best_time = time;
          sets = count + 1;
          std::copy(found, found + sets, best);
        }
      }
    }
  p.sets = sets;
  for (int32_t i = 0; i < sets; ++i) {
    p.set[i] = best[i];
    divide(p, p.set[i]);
    measure_patch(p, p.set[i]);
  }
}

}  // namespace fk
