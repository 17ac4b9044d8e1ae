// Depthwise convolutions of normalised tokens, each in front of a linear layer. A block has a patch of the map, which
// it reads and normalises once, filters it for every branch of its set, 64 channels at a time, and keeps the results of
// all channels in shared memory; the weights then stream past them. Most often the set is all three branches; where
// their weights are so large that reading them for few rows costs more than reading x again, or where shared memory
// has no room for all, the branches have blocks of their own, which are neighbours. Prefix tokens, which are not
// filtered, have blocks of their own as well.
#include <algorithm>
#include <initializer_list>

#include "depthwise.h"
#include "rows.h"
#include "weights.h"

namespace fk {
namespace {

constexpr int kThreads = 256;
// Of a patch, and more pixels than any shared memory has room for.
constexpr int64_t kLongestSide = 1 << 16;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSlots = 3;  // for tiles of weights

// Of a patch's tokens and of a tile's results, what the filters of one branch cover along one side of the map.
struct Span {
  int begin, end;
};

__host__ __device__ Span span_of(const ProjectionBranch& b, bool down, int index) {
  const int tile = down ? b.tile_height : b.tile_width, size = down ? b.out_height : b.out_width;
  const int first = index * tile, last = min(first + tile, size) - 1;
  return {first * b.stride - b.padding, last < first ? INT32_MIN : last * b.stride - b.padding + b.kernel};
}

// The same of all branches of a set; empty where none of them has results.
__host__ __device__ Span span_of(const ConvProjection& p, const ProjectionSet& set, bool down, int index) {
  Span all = {0, 0};
  bool any = false;
  for (int i = set.first; i < set.first + set.count; ++i) {
    const Span own = span_of(p.branches[i], down, index);
    if (own.end == INT32_MIN) continue;
    all = any ? Span{min(all.begin, own.begin), max(all.end, own.end)} : own;
    any = true;
  }
  return all;
}

__host__ __device__ int results_of(const ProjectionBranch& b) { return b.tile_height * b.tile_width; }

// Rows that a block's warps multiply for so many results.
__host__ __device__ int shared_rows(int results) { return results <= 32 ? 32 : results <= 64 ? 64 : 128; }

// Where the parts of a block's shared memory begin, in bytes; `end` is its size.
struct Layout {
  int rows, spreads, factors, patch, filtered, staging, end;
  int prefixes;  // that a block has at a time
};

template <class T>
__host__ __device__ Layout layout_of(const ConvProjection& p, const ProjectionSet& set) {
  constexpr int kRowBytes = tile_stride<T>(kChannels) * sizeof(T);
  constexpr int kOutBytes = tile_stride<T>(kWeightRows) * sizeof(T);
  int factors = 0, filtered = 0, going_out = 0;
  for (int i = set.first; i < set.first + set.count; ++i) {
    const ProjectionBranch& b = p.branches[i];
    factors += 1 + b.kernel * b.kernel;
    filtered += round_up(results_of(b), 16);
    going_out = max(going_out, shared_rows(results_of(b)));
  }
  const int patch = set.patch_height * set.patch_width;
  Layout at;
  at.prefixes = min(filtered, 64);
  if (p.prefix) going_out = max(going_out, shared_rows(at.prefixes));
  const int places = round_up(max(patch, at.prefixes), 4);
  at.rows = 0;
  at.spreads = at.rows + places * static_cast<int>(sizeof(int));
  at.factors = at.spreads + places * static_cast<int>(sizeof(float2));
  at.patch = at.factors + factors * kChannels * static_cast<int>(sizeof(float));
  // Results leave through the patch's tile.
  at.filtered = at.patch + max(patch * kRowBytes, going_out * kOutBytes);
  at.staging = at.filtered + filtered * tile_stride<T>(p.channels) * static_cast<int>(sizeof(T));
  at.end = at.staging + weight_tiles_bytes(kSlots);
  return at;
}

// The weights of a set's branches: 64 rows after another, each from its first channel to its last.
template <class T>
struct SetWeights {
  const ConvProjection* p;
  int branch, end, row, channel;

  __device__ bool vectors() const { return p->vectors; }
  __device__ WeightTile<T> next() {
    if (branch == end) return {nullptr, 0, 0, 0};
    const Linear& linear = p->branches[branch].linear;
    constexpr int kDepth = kStageBytes / sizeof(T);
    const WeightTile<T> tile = {static_cast<const T*>(linear.weight) + int64_t{row} * p->channels + channel,
                                linear.out - row, min(kDepth, p->channels - channel), p->channels};
    channel += kDepth;
    if (channel >= p->channels) {
      channel = 0;
      row += kWeightRows;
    }
    if (row >= linear.out) {
      row = 0;
      ++branch;
    }
    return tile;
  }
};

// Multiplies a branch's `results` rows by its weight and writes them out: row r where `row_of(r)` says, negative for
// none. `out` is a tile that no warp reads any more.
template <int kDown, int kRowTiles, class T, class Weights, class RowOf>
__device__ void project(const ConvProjection& p, const ProjectionBranch& b, const T* filtered, int stride, int results,
                        Weights& weights, T* out, const RowOf& row_of) {
  using Share = WarpShare<kWarps, kDown, kRowTiles>;
  constexpr int kOutStride = tile_stride<T>(kWeightRows), kDepth = Weights::kDepth;
  const int own = Share::first_row(), column = Share::first_column();
  const T* rows[kRowTiles];
  // Beyond the last rows a warp multiplies those again, and does not write them.
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) rows[i] = filtered + min(own + 16 * i, round_up(results, 16) - 16) * stride;
  T* tile = out + own * kOutStride + column;
  const bool vectors = b.linear.out % kVector<T> == 0 && reinterpret_cast<uintptr_t>(b.out) % 16 == 0;
#pragma unroll 1
  for (int first = 0; first < b.linear.out; first += kWeightRows) {
    float sums[kRowTiles][Share::kColumnTiles][4];
    for (int i = 0; i < kRowTiles; ++i) clear(sums[i]);
#pragma unroll 1
    for (int channel = 0; channel < p.channels; channel += kDepth) {
      const T* from[kRowTiles];
      for (int i = 0; i < kRowTiles; ++i) from[i] = rows[i] + channel;
      multiply_tile(sums, from, stride, weights.next(), column, p.channels - channel);
    }
    const int count = min(b.linear.out - first - column, Share::kColumns);
    if (count <= 0) continue;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      add_bias<T>(sums[i], b.linear.bias, first + column, count);
      put_tile(sums[i], tile + 16 * i * kOutStride, kOutStride, count, Share::kColumns);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      write_rows<Share::kColumns / kVector<T>>(
          tile + 16 * i * kOutStride, kOutStride, count, b.out, p.dtype, Array{nullptr, kF32}, vectors,
          [&](int r) {
            const int64_t row = own + 16 * i + r < results ? row_of(own + 16 * i + r) : int64_t{-1};
            return row < 0 ? row : row * b.linear.out + first + column;
          },
          [](float) {});
  }
}

// What a block has to do: a patch of a sample, or as many of all samples' prefix tokens as it takes.
struct Work {
  int set, sample, index;
  bool filters;
};

template <class T>
__device__ Work work_of(const ConvProjection& p) {
  int block = static_cast<int>(blockIdx.x), per_sample = 0;
#pragma unroll 1
  for (int s = 0; s < p.sets; ++s) {
    const int blocks = parts(int64_t{p.batch} * p.prefix, layout_of<T>(p, p.set[s]).prefixes);
    if (block < blocks) return {s, 0, block, false};
    block -= blocks;
    per_sample += p.set[s].down * p.set[s].across;
  }
  const int sample = block / per_sample;
  block %= per_sample;
  int s = 0;
  while (block >= p.set[s].down * p.set[s].across) {
    block -= p.set[s].down * p.set[s].across;
    ++s;
  }
  return {s, sample, block, true};
}

// A block's patch of the map, 64 channels at a time: `row_at` is the row of x of its pixels, negative beyond the map.
template <class T, class RowAt>
class Patch {
 public:
  static constexpr int kStride = tile_stride<T>(kChannels);

  __device__ Patch(const ConvProjection& p, T* tile, float2* spreads, int rows, const RowAt& row_at)
      : p_(p), tile_(tile), spreads_(spreads), rows_(rows), row_at_(row_at) {
    vectors_ = p.x.aligned && p.channels % kVector<T> == 0;
    if (p.norm.kind == kLayerNorm) find_spreads();
  }

  // All warps take part and meet behind this.
  __device__ void fill(int first_channel) {
    const int column = first_channel + own_column();
    const RowAffine<T> affine(p_.norm, column, p_.channels);
#pragma unroll 1
    for (int from = warp_index() * kRowsOfWarp<T>; from < rows_; from += kWarps * kRowsOfWarp<T>) {
      int64_t first[kRowsOfLane];
      RowVectors<T> values;
      find_rows(first, from);
      load_rows(values, p_.x, first, column, p_.channels, vectors_);
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        const int r = row_of_lane(from, i);
        if (r < rows_)
          store_normalized(tile_ + r * kStride + own_column(), values.x[i],
                           p_.norm.kind == kLayerNorm ? spreads_[r] : make_float2(0.0f, 1.0f), affine, first[i] >= 0,
                           column, p_.channels);
      }
    }
  }

 private:
  __device__ static int own_column() { return lane_index() % kLanesOfRow<T> * kVector<T>; }
  __device__ static int row_of_lane(int from, int i) {
    return from + lane_index() / kLanesOfRow<T> + i * (kWarp / kLanesOfRow<T>);
  }

  __device__ void find_rows(int64_t (&first)[kRowsOfLane], int from) const {
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const int r = row_of_lane(from, i);
      const int64_t row = r < rows_ ? row_at_(r) : int64_t{-1};
      first[i] = row < 0 ? row : row * p_.channels;
    }
  }

  // Of the rows that this warp fills later.
  __device__ void find_spreads() {
#pragma unroll 1
    for (int from = warp_index() * kRowsOfWarp<T>; from < rows_; from += kWarps * kRowsOfWarp<T>) {
      int64_t first[kRowsOfLane];
      float2 found[kRowsOfLane];
      RowVectors<T> values;
      find_rows(first, from);
      load_rows(values, p_.x, first, own_column(), p_.channels, vectors_);
      row_spreads(found, values, p_.x, first, p_.channels, vectors_, p_.norm.eps);
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i)
        if (own_column() == 0 && row_of_lane(from, i) < rows_) spreads_[row_of_lane(from, i)] = found[i];
    }
    __syncwarp();
  }

  const ConvProjection& p_;
  T* tile_;
  float2* spreads_;
  int rows_;
  bool vectors_;
  const RowAt& row_at_;
};

// The filters of a set's branches for 64 channels, the batch norms in them, and behind each its shift.
template <class T>
__device__ void fill_factors(float* to, const ConvProjection& p, const ProjectionSet& set, int first_channel) {
#pragma unroll 1
  for (int i = set.first; i < set.first + set.count; ++i) {
    const ProjectionBranch& b = p.branches[i];
    const int taps = b.kernel * b.kernel;
    // A channel's taps lie one after another, and are read so.
#pragma unroll 1
    for (int j = threadIdx.x; j < kChannels * taps; j += kThreads) {
      const int channel = min(first_channel + j / taps, p.channels - 1);
      to[j % taps * kChannels + j / taps] =
          load<T>(b.filter, int64_t{channel} * taps + j % taps) * scale_of<T>(b.norm, channel);
    }
    for (int j = threadIdx.x; j < kChannels; j += kThreads) {
      const int channel = min(first_channel + j, p.channels - 1);
      to[taps * kChannels + j] = shift_of<T>(b.norm, channel, scale_of<T>(b.norm, channel));
    }
    to += (taps + 1) * kChannels;
  }
}

// Filters a patch that begins at these places of the map for every branch of a set. The warps take the runs of all
// branches in turn.
template <class T>
__device__ void filter(const ConvProjection& p, const ProjectionSet& set, int down, int across, Span rows, Span columns,
                       const T* patch, const float* factors, T* filtered, int stride, int channel) {
  constexpr int kStride = tile_stride<T>(kChannels);
  int run = warp_index();
#pragma unroll 1
  for (int i = set.first; i < set.first + set.count; ++i) {
    const ProjectionBranch& b = p.branches[i];
    const Runs runs(b.tile_height, b.tile_width);
    const int taps = b.kernel * b.kernel, top = down * b.tile_height, left = across * b.tile_width;
#pragma unroll 1
    for (; run < runs.count; run += kWarps) {
      const int y = runs.row(run), x = runs.column(run), size = min(runs.size(run), b.out_width - left - x);
      if (top + y >= b.out_height || size <= 0) continue;
      const float2 shift = load_pair(factors + taps * kChannels);
      float2 results[kRun];
      for (int r = 0; r < kRun; ++r) results[r] = shift;
      const int from = ((top + y) * b.stride - b.padding - rows.begin) * set.patch_width + (left + x) * b.stride -
                       b.padding - columns.begin;
      add_filtered(results, patch + from * kStride, kStride, set.patch_width, size, b.stride, factors, b.kernel);
      // Zeros up to the last fragment, nothing beyond.
      if (channel >= stride - kVector<T>) continue;
      T* to = filtered + (y * b.tile_width + x) * stride + channel;
#pragma unroll
      for (int r = 0; r < kRun; ++r)
        if (r < size)
          store_pair(to + r * stride, channel < p.channels ? results[r].x : 0.0f,
                     channel + 1 < p.channels ? results[r].y : 0.0f);
    }
    run -= runs.count;
    filtered += round_up(results_of(b), 16) * stride;
    factors += (taps + 1) * kChannels;
  }
}

// Registers for two blocks on a multiprocessor; whether shared memory has room for them is for `choose_sets` to weigh.
// In fp32 that would spill.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2) conv_projection_kernel(const ConvProjection p) {
  const Work work = work_of<T>(p);
  const ProjectionSet& set = p.set[work.set];
  const int end = set.first + set.count, stride = tile_stride<T>(p.channels);
  const Layout at = layout_of<T>(p, set);
  unsigned char* memory = shared_memory();
  T* patch = reinterpret_cast<T*>(memory + at.patch);
  T* filtered = reinterpret_cast<T*>(memory + at.filtered);
  using Source = SetWeights<T>;
  WeightTiles<T, Source, kSlots> weights(reinterpret_cast<T*>(memory + at.staging), Source{&p, set.first, end, 0, 0});
  const int tokens = p.prefix + p.height * p.width;
  const int down = work.index / set.across, across = work.index % set.across;
  const int first_prefix = work.index * at.prefixes;

  if (work.filters) {
    const Span spans[2] = {span_of(p, set, true, down), span_of(p, set, false, across)};
    const int count = (spans[0].end - spans[0].begin) * set.patch_width;
    // The patch's pixels as tokens of the sample.
    int* rows = reinterpret_cast<int*>(memory + at.rows);
    for (int r = threadIdx.x; r < count; r += kThreads) {
      const int y = spans[0].begin + r / set.patch_width, x = spans[1].begin + r % set.patch_width;
      const bool here = y >= 0 && y < p.height && x >= 0 && x < min(p.width, spans[1].end);
      rows[r] = here ? p.prefix + y * p.width + x : -1;
    }
    __syncthreads();
    const int64_t first_row = int64_t{work.sample} * tokens;
    const auto row_at = [&](int r) { return rows[r] < 0 ? int64_t{-1} : first_row + rows[r]; };
    Patch<T, decltype(row_at)> source(p, patch, reinterpret_cast<float2*>(memory + at.spreads), count, row_at);
    float* factors = reinterpret_cast<float*>(memory + at.factors);
#pragma unroll 1
    for (int first = 0; first < p.channels; first += kChannels) {
      fill_factors<T>(factors, p, set, first);
      source.fill(first);
      __syncthreads();
      const int own = 2 * lane_index();
      filter(p, set, down, across, spans[0], spans[1], patch + own, factors + own, filtered, stride, first + own);
      __syncthreads();
    }
  } else {
    const int last = p.batch * p.prefix;
    fill_normalized_rows(filtered, stride, at.prefixes, warp_index() * kRowsOfWarp<T>, kWarps * kRowsOfWarp<T>, p.x,
                         p.channels, p.norm, 0, p.x.aligned && p.channels % kVector<T> == 0, [&](int r) {
                           const int row = first_prefix + r;
                           return row < last ? int64_t{row / p.prefix} * tokens + row % p.prefix : int64_t{-1};
                         });
  }

#pragma unroll 1
  for (int i = set.first; i < end; ++i) {
    const ProjectionBranch& b = p.branches[i];
    const int results = work.filters ? results_of(b) : min(at.prefixes, p.batch * p.prefix - first_prefix);
    const int64_t out_tokens = p.prefix + int64_t{b.out_height} * b.out_width;
    const auto row_of = [&](int r) {
      if (!work.filters) return (first_prefix + r) / p.prefix * out_tokens + (first_prefix + r) % p.prefix;
      const int y = down * b.tile_height + r / b.tile_width, x = across * b.tile_width + r % b.tile_width;
      return y < b.out_height && x < b.out_width ? work.sample * out_tokens + p.prefix + int64_t{y} * b.out_width + x
                                                 : int64_t{-1};
    };
    if (results <= 32)
      project<2, 1>(p, b, filtered, stride, results, weights, patch, row_of);
    else if (results <= 64)
      project<4, 1>(p, b, filtered, stride, results, weights, patch, row_of);
    else
      project<4, 2>(p, b, filtered, stride, results, weights, patch, row_of);
    if (work.filters) filtered += round_up(results, 16) * stride;
  }
}

template <class T>
const char* launch_for(const ConvProjection& p, void* stream) {
  int64_t per_sample = 0, blocks = 0;
  for (int i = 0; i < p.sets; ++i) {
    per_sample += int64_t{p.set[i].down} * p.set[i].across;
    blocks += parts(int64_t{p.batch} * p.prefix, layout_of<T>(p, p.set[i]).prefixes);
  }
  blocks += p.batch * per_sample;
  return launch_kernel(conv_projection_kernel<T>, blocks, kThreads, shared_bytes(p), stream, p);
}

}  // namespace

// The first and the last block have the largest patch: how far apart its branches reach is convex in between.
void measure_patch(const ConvProjection& p, ProjectionSet& set) {
  const auto longest = [&](bool down, int64_t blocks) {
    int64_t most = 0;
    for (const int64_t index : {int64_t{0}, blocks - 1}) {
      int64_t begin = INT64_MAX, end = INT64_MIN;
      for (int i = set.first; i < set.first + set.count; ++i) {
        const ProjectionBranch& b = p.branches[i];
        const int64_t tile = down ? b.tile_height : b.tile_width, first = index * tile * b.stride - b.padding;
        begin = std::min(begin, first);
        end = std::max(end, first + (tile - 1) * b.stride + b.kernel);
      }
      most = std::max(most, end - begin);
    }
    return static_cast<int32_t>(std::min(most, kLongestSide));
  };
  set.patch_height = longest(true, set.down);
  set.patch_width = longest(false, set.across);
}

int32_t projected_rows(const ProjectionBranch& b) { return shared_rows(results_of(b)); }

int64_t shared_bytes(const ConvProjection& p, const ProjectionSet& set) {
  // Whose bytes 32 bits may not hold.
  if (int64_t{set.patch_height} * set.patch_width > kLongestSide) return INT32_MAX;
  return (p.dtype == kF32 ? layout_of<float>(p, set) : layout_of<bf16>(p, set)).end;
}

int64_t shared_bytes(const ConvProjection& p) {
  int64_t most = 0;
  for (int i = 0; i < p.sets; ++i) most = std::max(most, shared_bytes(p, p.set[i]));
  return most;
}

const char* launch(const ConvProjection& p, void* stream) {
  switch (p.dtype) {
    case kF32:
      return launch_for<float>(p, stream);
    case kBF16:
      return launch_for<bf16>(p, stream);
    default:
      return launch_for<f16>(p, stream);
  }
}

}  // namespace fk
