// The MLP with a depthwise convolution in it, on chip: a block has a patch of the map as its input, and makes 64 hidden
// channels of it at a time, filters them, and adds what they give to its results, which stay in registers. Results with
// more channels than registers are made in slices, by blocks that make the hidden channels anew.
#include "depthwise.h"
#include "moments.h"
#include "rows.h"
#include "weights.h"

namespace fk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSlots = 3;  // for tiles of weights
constexpr int kSpreadBytes = kWarps * 16;
// Pixels are expanded 128 at a time, results projected 64 at a time: a warp has 32 or 16 rows of 32 columns.
using Expands = WarpShare<kWarps, 4, kPatchRows / 64>;
using Projects = WarpShare<kWarps, 4, kTileRows / 64>;
static_assert(kHiddenChunk == kChannels && kHiddenChunk == kWeightRows);

// Of the channels in work, what is added to the filtered ones, and the factors and shifts of the two batch norms.
enum Row { kFilterBias, kScale1, kShift1, kScale2, kShift2, kTaps };

// How many pixels of a map a tile's filters reach at most along one side: no neighbours lie beyond a border.
__host__ __device__ int side_on_map(int size, int tile, int kernel) {
  const int inner_borders = min((size - 1) / tile, 2);
  return min(size, tile + inner_borders * (kernel / 2));
}

// Where the parts of a block's shared memory begin, in bytes; `end` is its size.
struct Layout {
  int places, channels, x, hidden, filtered, staging, end;
  int x_stride, rows, patch_width, patch;
};

template <class T>
__host__ __device__ Layout layout_of(const DepthwiseMlp& p) {
  constexpr int kHiddenBytes = tile_stride<T>(kHiddenChunk) * sizeof(T);
  Layout at;
  at.x_stride = tile_stride<T>(p.expand.in);
  at.rows = round_up(side_on_map(p.height, p.tile_height, p.kernel) * side_on_map(p.width, p.tile_width, p.kernel), 16);
  at.patch_width = p.tile_width + p.kernel - 1;
  at.patch = (p.tile_height + p.kernel - 1) * at.patch_width;
  at.places = kSpreadBytes;
  at.channels = at.places + at.rows * static_cast<int>(sizeof(int));
  at.x = at.channels + (kTaps + p.kernel * p.kernel) * kHiddenChunk * static_cast<int>(sizeof(float));
  at.hidden = at.x + at.rows * at.x_stride * static_cast<int>(sizeof(T));
  // Results leave through the patch of hidden channels.
  at.filtered = at.hidden + max(at.patch, kTileRows) * kHiddenBytes;
  at.staging = at.filtered + kTileRows * kHiddenBytes;
  at.end = at.staging + weight_tiles_bytes(kSlots);
  return at;
}

// For one chunk of hidden channels after another: the rows of `expand`, then the columns of `project`.
template <class T>
struct MlpWeights {
  const DepthwiseMlp* p;
  int first_column, hidden, panel, depth;  // panel -1: of `expand`

  __device__ bool vectors() const { return p->vectors; }
  __device__ WeightTile<T> next() {
    constexpr int kDepth = kStageBytes / sizeof(T);
    const Linear &expand = p->expand, &project = p->project;
    if (hidden >= expand.out) return {nullptr, 0, 0, 0};
    const int count = min(kHiddenChunk, expand.out - hidden), all = panel < 0 ? expand.in : count;
    const int columns = min(p->columns, project.out - first_column);
    const int64_t row = panel < 0 ? hidden : first_column + panel * kWeightRows;
    const T* weight = static_cast<const T*>(panel < 0 ? expand.weight : project.weight);
    const WeightTile<T> tile = {weight + (panel < 0 ? row * expand.in : row * project.in + hidden) + depth,
                                panel < 0 ? count : columns - panel * kWeightRows, min(kDepth, all - depth),
                                panel < 0 ? expand.in : project.in};
    depth += kDepth;
    if (depth < all) return tile;
    depth = 0;
    ++panel;
    if (panel * kWeightRows >= columns) {
      panel = -1;
      hidden += kHiddenChunk;
    }
    return tile;
  }
};

template <int kCount, class Function>
__device__ void apply(float (&x)[kCount], const Function& function) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = function(x[i]);
}

template <int kCount>
__device__ void activate(Activation activation, float (&x)[kCount]) {
  switch (activation) {
    case kGelu:
      return apply(x, [](float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f)); });
    case kQuickGelu:
      return apply(x, [](float v) { return v / (1.0f + expf(-1.702f * v)); });
    case kSilu:
      return apply(x, [](float v) { return v / (1.0f + expf(-v)); });
    case kRelu:
      return apply(x, [](float v) { return v < 0.0f ? 0.0f : v; });  // NaN stays
    default:
      return;
  }
}

// A batch norm around an activation, of a lane's two channels of `kCount` / 2 pixels.
template <int kCount>
__device__ void activate_and_norm(float (&x)[kCount], Activation activation, bool norm_follows, const float* scales,
                                  const float* shifts) {
  const float2 scale = load_pair(scales), shift = load_pair(shifts);
  const auto norm = [&] {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      x[i] = x[i] * scale.x + shift.x;
      x[i + 1] = x[i + 1] * scale.y + shift.y;
    }
  };
  if (!norm_follows) norm();
  activate(activation, x);
  if (norm_follows) norm();
}

// The batch norm of the results, channels from `first` on, of which `count` are there.
template <class T, int kTiles>
__device__ void add_norm(float (&sums)[kTiles][4], const BatchNorm& norm, int first, int count) {
  if (!norm.mean.data) return;
  const int own = lane_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = first + min(n * 8 + own + i, count - 1);
      const float scale = scale_of<T>(norm, channel), shift = shift_of<T>(norm, channel, scale);
      sums[n][i] = sums[n][i] * scale + shift;
      sums[n][i + 2] = sums[n][i + 2] * scale + shift;
    }
}

struct Place {
  int left, top, sample, first_column, columns, tile_index;
};

__device__ Place place_of(const DepthwiseMlp& p, int block) {
  const int tile = block / p.slices, row = tile / p.across, first = block % p.slices * p.columns;
  return {tile % p.across * p.tile_width,
          row % p.down * p.tile_height,
          row / p.down,
          first,
          min(p.columns, p.project.out - first),
          tile};
}

// Writes a block's results out and sums them up; every warp is past its last look at the hidden channels, whose tile
// they leave through.
template <class T, int kPanels>
__device__ void finish(const DepthwiseMlp& p, float (&sums)[kPanels][Projects::kColumnTiles][4], T* hidden,
                       unsigned char* memory) {
  constexpr int kStride = tile_stride<T>(kHiddenChunk);
  const Place at = place_of(p, unknown(static_cast<int>(blockIdx.x)));
  const int64_t first_pixel = int64_t{at.sample} * (p.prefix + p.height * p.width) + p.prefix;
  // The row that a result is in, negative beyond the tile and the map.
  const auto row_of = [&](int result) {
    const int y = at.top + result / p.tile_width, c = at.left + result % p.tile_width;
    const bool here = result < p.tile_height * p.tile_width && y < p.height && c < p.width;
    return here ? first_pixel + y * p.width + c : int64_t{-1};
  };
  SpreadSums spread;
  const bool vectors = p.project.out % kVector<T> == 0 && at.first_column % kVector<T> == 0 &&
                       reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && (!p.residual.data || p.residual.aligned);
  const int rows = Projects::first_row(), own_column = Projects::first_column();
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const int width = at.columns - panel * kWeightRows, of_panel = at.first_column + panel * kWeightRows;
    if (width <= 0) break;
    const int column = of_panel + own_column, count = min(width - own_column, Projects::kColumns);
    if (count > 0) {
      add_bias<T>(sums[panel], p.project.bias, column, count);
      add_norm<T>(sums[panel], p.norms[2], column, count);
      T* tile = hidden + rows * kStride + own_column;
      put_tile(sums[panel], tile, kStride, count, Projects::kColumns);
      __syncwarp();
      write_rows<Projects::kColumns / kVector<T>>(
          tile, kStride, count, p.out, p.out_dtype, p.residual, vectors,
          [&](int r) {
            const int64_t row = row_of(rows + r);
            return row < 0 ? row : row * p.project.out + column;
          },
          [&](float value) { spread.add(value); });
      __syncwarp();
    }
    if (p.sums) {
      __syncthreads();
#pragma unroll 1
      for (int c = threadIdx.x; c < min(kWeightRows, width); c += kThreads) {
        float sum = 0.0f;
#pragma unroll 1
        for (int result = 0; result < p.tile_height * p.tile_width; ++result)
          if (row_of(result) >= 0) sum += to_float(hidden[result * kStride + c]);
        p.sums[int64_t{at.tile_index} * p.project.out + of_panel + c] = sum;
      }
      __syncthreads();
    }
  }

  if (p.moments) {
    const Spread all = merge_block(spread.result(), reinterpret_cast<Spread*>(memory));
    if (threadIdx.x == 0) reinterpret_cast<Spread*>(p.moments)[blockIdx.x] = all;
  }
}

// Up to 128 columns of 16-bit results two blocks share a multiprocessor, with 128 registers for a thread. The
// accumulators of three panels and more take 180 to 255 without spilling: such a block is alone. On an A100 it would be
// from 256 channels on anyway, for want of shared memory.
template <class T, int kPanels>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && kPanels <= 2 ? 2 : 1)
    depthwise_mlp_kernel(const DepthwiseMlp p) {
  const Layout at = layout_of<T>(p);
  constexpr int kStride = tile_stride<T>(kHiddenChunk);
  unsigned char* memory = shared_memory();
  int* places = reinterpret_cast<int*>(memory + at.places);
  float* channels = reinterpret_cast<float*>(memory + at.channels);
  T* x = reinterpret_cast<T*>(memory + at.x);
  T* hidden = reinterpret_cast<T*>(memory + at.hidden);
  T* filtered = reinterpret_cast<T*>(memory + at.filtered);

  const Place place = place_of(p, static_cast<int>(blockIdx.x));
  const int left = place.left, top = place.top, first_column = place.first_column, columns = place.columns;
  const int64_t first_row = int64_t{place.sample} * (p.prefix + p.height * p.width), first_pixel = first_row + p.prefix;
  const int halo = p.kernel / 2, taps = p.kernel * p.kernel;
  using Source = MlpWeights<T>;
  WeightTiles<T, Source, kSlots> weights(reinterpret_cast<T*>(memory + at.staging), Source{&p, first_column, 0, -1, 0});

  // The pixels that there are, each by its place in the patch; negative from the last one on.
  const int above = max(top - halo, 0), before = max(left - halo, 0);
  const int rows_here = min(top + p.tile_height + halo, p.height) - above;
  const int columns_here = min(left + p.tile_width + halo, p.width) - before;
  for (int row = threadIdx.x; row < at.rows; row += kThreads) {
    const int y = above + row / columns_here - top + halo, c = before + row % columns_here - left + halo;
    places[row] = row < rows_here * columns_here ? y * at.patch_width + c : -1;
  }
  // Beyond the map the filter finds zeros.
  for (int i = threadIdx.x * kVector<T>; i < at.patch * kStride; i += kThreads * kVector<T>)
    store_vector(hidden + i, {});
  __syncthreads();
  const int lane = lane_index(), warp = warp_index();
  fill_normalized_rows(x, at.x_stride, at.rows, warp * kRowsOfWarp<T>, kWarps * kRowsOfWarp<T>, p.x, p.expand.in,
                       p.norm, place.sample, p.x.aligned && p.expand.in % kVector<T> == 0, [&](int r) {
                         const int y = top - halo + places[r] / at.patch_width;
                         const int c = left - halo + places[r] % at.patch_width;
                         return places[r] < 0 ? int64_t{-1} : first_pixel + y * p.width + c;
                       });
  if (top == 0 && left == 0)
    for (int row = warp; row < p.prefix; row += kWarps)
      for (int c = lane; c < columns; c += kWarp) {
        const int64_t index = (first_row + row) * p.project.out + first_column + c;
        store<T>(p.out, p.out_dtype, index, load_or<T>(p.residual, index, 0.0f));
      }

  float sums[kPanels][Projects::kColumnTiles][4];
  for (int panel = 0; panel < kPanels; ++panel) clear(sums[panel]);
  constexpr int kDepth = kStageBytes / sizeof(T);
#pragma unroll 1
  for (int first = 0; first < p.expand.out; first += kHiddenChunk) {
    const int count = min(kHiddenChunk, p.expand.out - first);
    for (int c = threadIdx.x; c < kHiddenChunk; c += kThreads) {
      const int channel = first + min(c, count - 1);
      const float scale1 = scale_of<T>(p.norms[0], channel), scale2 = scale_of<T>(p.norms[1], channel);
      channels[kFilterBias * kHiddenChunk + c] = load_or<T>(p.filter_bias, channel, 0.0f);
      channels[kScale1 * kHiddenChunk + c] = scale1;
      channels[kShift1 * kHiddenChunk + c] = shift_of<T>(p.norms[0], channel, scale1);
      channels[kScale2 * kHiddenChunk + c] = scale2;
      channels[kShift2 * kHiddenChunk + c] = shift_of<T>(p.norms[1], channel, scale2);
    }
    // A channel's taps lie one after another, and are read so.
#pragma unroll 1
    for (int i = threadIdx.x; i < kHiddenChunk * taps; i += kThreads)
      channels[(kTaps + i % taps) * kHiddenChunk + i / taps] =
          load<T>(p.filter, int64_t{first + min(i / taps, count - 1)} * taps + i % taps);

    const int own = Expands::first_row(), column = Expands::first_column();
    {
      constexpr int kRowTiles = kPatchRows / 64;
      float expanded[kRowTiles][Expands::kColumnTiles][4];
      for (int i = 0; i < kRowTiles; ++i) clear(expanded[i]);
#pragma unroll 1
      for (int depth = 0; depth < p.expand.in; depth += kDepth) {
        // Beyond the last rows a warp multiplies those again, and does not keep them.
        const T* from[kRowTiles];
        for (int i = 0; i < kRowTiles; ++i) from[i] = x + min(own + 16 * i, at.rows - 16) * at.x_stride + depth;
        multiply_tile(expanded, from, at.x_stride, weights.next(), column, p.expand.in - depth);
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if (own + 16 * i >= at.rows) continue;
        add_bias<T>(expanded[i], p.expand.bias, first + column, count - column);
        for_each_pair(expanded[i], own + 16 * i, [&](int r, int c, const float* values) {
          if (places[r] >= 0)
            store_pair(hidden + places[r] * kStride + column + c, column + c < count ? values[0] : 0.0f,
                       column + c + 1 < count ? values[1] : 0.0f);
        });
      }
    }
    __syncwarp();
    // Rows four apart meet no bank twice.
    const int pair = column + 2 * (lane % 16);
#pragma unroll 1
    for (int i = 0; i < Expands::kRows / 2; i += 2) {
      const int r = own + i % 4 + i / 4 * 8 + lane / 16 * 4;
      int to[2];
      float values[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        to[j] = r + j < at.rows ? places[r + j] : -1;
        const float2 own_pair = to[j] < 0 ? make_float2(0.0f, 0.0f) : load_pair(hidden + to[j] * kStride + pair);
        values[2 * j] = own_pair.x;
        values[2 * j + 1] = own_pair.y;
      }
      activate_and_norm(values, p.hidden_activation, p.norms_follow_activation,
                        channels + kScale1 * kHiddenChunk + pair, channels + kShift1 * kHiddenChunk + pair);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (to[j] >= 0) store_pair(hidden + to[j] * kStride + pair, values[2 * j], values[2 * j + 1]);
    }
    __syncthreads();

    const Runs runs(p.tile_height, p.tile_width);
    const float* factors = channels + 2 * lane;
#pragma unroll 1
    for (int run = warp; run < runs.count; run += kWarps) {
      const int y = runs.row(run), c = runs.column(run), size = runs.size(run);
      float2 results[kRun];
      const float2 bias = load_pair(factors + kFilterBias * kHiddenChunk);
      for (int i = 0; i < kRun; ++i) results[i] = bias;
      const T* corner = hidden + (y * at.patch_width + c) * kStride + 2 * lane;
      add_filtered(results, corner, kStride, at.patch_width, size, 1, factors + kTaps * kHiddenChunk, p.kernel);
      const T* center = corner + (halo * at.patch_width + halo) * kStride;
      T* to = filtered + (y * p.tile_width + c) * kStride + 2 * lane;
#pragma unroll
      for (int i = 0; i < kRun; i += 2) {
        float values[4] = {results[i].x, results[i].y, results[i + 1].x, results[i + 1].y};
        float inputs[4] = {};
        if (p.adds_before || p.adds_after)
          for (int j = 0; j < 2; ++j) {
            const float2 input = load_pair(center + min(i + j, size - 1) * kStride);
            inputs[2 * j] = input.x;
            inputs[2 * j + 1] = input.y;
          }
        for (int j = 0; j < 4; ++j) values[j] += p.adds_before ? inputs[j] : 0.0f;
        activate_and_norm(values, p.activation, p.norms_follow_activation, factors + kScale2 * kHiddenChunk,
                          factors + kShift2 * kHiddenChunk);
        for (int j = 0; j < 4; ++j) {
          values[j] += p.adds_after ? inputs[j] : 0.0f;
          if (2 * lane + j % 2 >= count) values[j] = 0.0f;
        }
        for (int j = 0; j < 2; ++j)
          if (i + j < size) store_pair(to + (i + j) * kStride, values[2 * j], values[2 * j + 1]);
      }
    }

#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      if (panel * kWeightRows >= columns) break;
#pragma unroll 1
      for (int depth = 0; depth < count; depth += kDepth) {
        const T* const from[1] = {filtered + Projects::first_row() * kStride + depth};
        multiply_tile(reinterpret_cast<float (&)[1][Projects::kColumnTiles][4]>(sums[panel]), from, kStride,
                      weights.next(), Projects::first_column(), count - depth);
      }
    }
  }

  finish<T>(p, sums, hidden, memory);
}

template <class T>
const char* launch_for(const DepthwiseMlp& p, void* stream) {
  constexpr int kMostPanels = most_columns(sizeof(T) == 4 ? kF32 : kBF16) / kWeightRows;
  const int panels = parts(p.columns, kWeightRows);
  const auto kernel = panels <= 1   ? depthwise_mlp_kernel<T, 1>
                      : panels <= 2 ? depthwise_mlp_kernel<T, 2>
                      : panels <= 3 ? depthwise_mlp_kernel<T, 3>
                      : panels <= 6 ? depthwise_mlp_kernel<T, 6>
                                    : depthwise_mlp_kernel<T, kMostPanels>;
  return launch_kernel(kernel, p.batch * blocks_per_sample(p), kThreads, layout_of<T>(p).end, stream, p);
}

}  // namespace

int64_t tiles_per_sample(const DepthwiseMlp& p) { return int64_t{p.down} * p.across; }

int64_t blocks_per_sample(const DepthwiseMlp& p) { return tiles_per_sample(p) * p.slices; }

int64_t shared_bytes(const DepthwiseMlp& p) { return (p.dtype == kF32 ? layout_of<float>(p) : layout_of<bf16>(p)).end; }

const char* launch(const DepthwiseMlp& p, void* stream) {
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
