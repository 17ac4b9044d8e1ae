// The MLP with a depthwise convolution in it, on chip: a block has a patch of the map as its input, and makes 64 hidden
// channels of it at a time, filters them, and adds what they give to its results, which stay in registers. Results with
// more channels than registers are made in slices, by blocks that make the hidden channels anew.
#include "depthwise.h"
#include "moments.h"
#include "rows.h"

namespace fk {
namespace {

constexpr int kThreads = kPatchRows / 16 * kWarp;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSpreadBytes = kWarps * 16;
// Warps in pairs: 16 rows of the results each, and 64 columns of a panel of 128.
constexpr int kGroups = 2;
constexpr int kColumns = kGroups * kPanel;
constexpr int kResultsOfWarp = kTileRows / kWarps;

// Of the channels in work, what is added to the filtered ones, and the factors and shifts of the two batch norms.
enum Row { kFilterBias, kScale1, kShift1, kScale2, kShift2, kTaps };

// How many pixels of a map a tile's filters reach at most along one side: no neighbours lie beyond a border.
__host__ __device__ int side_on_map(int size, int tile, int kernel) {
  const int inner_borders = min((size - 1) / tile, 2);
  return min(size, tile + inner_borders * (kernel / 2));
}

// Where the parts of a block's shared memory begin, in bytes; `end` is its size.
struct Layout {
  int places, corners, channels, x, hidden, filtered, staging, end;
  int x_stride, rows, patch_width, patch;
};

template <class T>
__host__ __device__ Layout layout_of(const DepthwiseMlp& p) {
  constexpr int kHiddenBytes = tile_stride<T>(kHiddenChunk) * sizeof(T);
  constexpr int kOutBytes = kTileRows * tile_stride<T>(kColumns) * sizeof(T);
  Layout at;
  at.x_stride = tile_stride<T>(p.expand.in);
  at.rows = round_up(side_on_map(p.height, p.tile_height, p.kernel) * side_on_map(p.width, p.tile_width, p.kernel), 16);
  at.patch_width = p.tile_width + p.kernel - 1;
  at.patch = (p.tile_height + p.kernel - 1) * at.patch_width;
  at.places = kSpreadBytes;
  at.corners = at.places + at.rows * static_cast<int>(sizeof(int));
  at.channels = at.corners + kTileRows * static_cast<int>(sizeof(int));
  at.x = at.channels + (kTaps + p.kernel * p.kernel) * kHiddenChunk * static_cast<int>(sizeof(float));
  at.hidden = at.x + at.rows * at.x_stride * static_cast<int>(sizeof(T));
  at.filtered = at.hidden + at.patch * kHiddenBytes;
  // Results leave through both tiles of hidden channels.
  at.staging = at.hidden + max((at.patch + kTileRows) * kHiddenBytes, kOutBytes);
  at.end = at.staging + kGroups * static_cast<int>(kStagingBytes);
  return at;
}

__device__ float activate(Activation activation, float x) {
  switch (activation) {
    case kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case kQuickGelu:
      return x / (1.0f + expf(-1.702f * x));
    case kSilu:
      return x / (1.0f + expf(-x));
    case kRelu:
      return x < 0.0f ? 0.0f : x;  // NaN stays
    default:
      return x;
  }
}

template <class T, int kPanels>
__global__ void __launch_bounds__(kThreads, 1) depthwise_mlp_kernel(const DepthwiseMlp p) {
  const Layout at = layout_of<T>(p);
  constexpr int kStride = tile_stride<T>(kHiddenChunk);
  constexpr int kOutStride = tile_stride<T>(kColumns);
  unsigned char* memory = shared_memory();
  int* places = reinterpret_cast<int*>(memory + at.places);
  int* corners = reinterpret_cast<int*>(memory + at.corners);
  float* channels = reinterpret_cast<float*>(memory + at.channels);
  T* x = reinterpret_cast<T*>(memory + at.x);
  T* hidden = reinterpret_cast<T*>(memory + at.hidden);
  T* filtered = reinterpret_cast<T*>(memory + at.filtered);
  T* staging = reinterpret_cast<T*>(memory + at.staging);

  const int across = parts(p.width, p.tile_width), down = parts(p.height, p.tile_height);
  const int slices = parts(p.project.out, p.columns);
  const int slice = static_cast<int>(blockIdx.x) % slices, tile_index = static_cast<int>(blockIdx.x) / slices;
  const int left = tile_index % across * p.tile_width, top = tile_index / across % down * p.tile_height;
  const int sample = tile_index / across / down;
  const int64_t first_row = int64_t{sample} * (p.prefix + p.height * p.width), first_pixel = first_row + p.prefix;
  const int first_column = slice * p.columns, columns = min(p.columns, p.project.out - first_column);
  const int halo = p.kernel / 2, taps = p.kernel * p.kernel;

  // The pixels that there are, each by its place in the patch; negative from the last one on.
  const int above = max(top - halo, 0), before = max(left - halo, 0);
  const int rows_here = min(top + p.tile_height + halo, p.height) - above;
  const int columns_here = min(left + p.tile_width + halo, p.width) - before;
  for (int row = threadIdx.x; row < at.rows; row += kThreads) {
    const int y = above + row / columns_here - top + halo, c = before + row % columns_here - left + halo;
    places[row] = row < rows_here * columns_here ? y * at.patch_width + c : -1;
  }
  // The place that the filter begins at for each result.
  for (int result = threadIdx.x; result < kTileRows; result += kThreads)
    corners[result] =
        result < p.tile_height * p.tile_width ? result / p.tile_width * at.patch_width + result % p.tile_width : 0;
  // Beyond the map the filter finds zeros.
  for (int i = threadIdx.x; i < at.patch * kStride; i += kThreads) hidden[i] = from_float<T>(0.0f);
  __syncthreads();
  const int lane = lane_index(), warp = warp_index(), own = 16 * warp;
  const bool expands = own < at.rows;
  if (expands)
    fill_normalized_rows(x, at.x_stride, p.x, p.expand.in, p.norm, sample, [&](int r) {
      const int y = top - halo + places[r] / at.patch_width, c = left - halo + places[r] % at.patch_width;
      return places[r] < 0 ? int64_t{-1} : first_pixel + y * p.width + c;
    });
  if (top == 0 && left == 0)
    for (int row = warp; row < p.prefix; row += kWarps)
      for (int c = lane; c < columns; c += kWarp) {
        const int64_t index = (first_row + row) * p.project.out + first_column + c;
        store<T>(p.out, p.out_dtype, index, load_or<T>(p.residual, index, 0.0f));
      }

  const int rows = 16 * (warp / kGroups), group = warp % kGroups;
  float sums[kPanels][kPanelTiles][4];
  for (int panel = 0; panel < kPanels; ++panel) clear(sums[panel]);
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
      for (int tap = 0; tap < taps; ++tap)
        channels[(kTaps + tap) * kHiddenChunk + c] = load<T>(p.filter, int64_t{channel} * taps + tap);
    }

    {
      float expanded[kPanelTiles][4];
      clear(expanded);
      const T* weight = static_cast<const T*>(p.expand.weight) + int64_t{first} * p.expand.in;
      multiply_by_weight<1>(expanded, expands ? x + own * at.x_stride : nullptr, at.x_stride, weight, p.expand.in,
                            p.expand.in, count, p.vectors, staging);
      add_bias<T>(expanded, p.expand.bias, first, count);
      if (expands)
        for_each_pair(expanded, own, [&](int r, int c, const float* values) {
          if (places[r] >= 0)
            store_pair(hidden + places[r] * kStride + c, c < count ? values[0] : 0.0f,
                       c + 1 < count ? values[1] : 0.0f);
        });
    }
    __syncwarp();

    const auto at_channel = [&](int row, int i) { return channels[row * kHiddenChunk + 2 * lane + i]; };
#pragma unroll 1
    for (int r = own; r < min(own + 16, at.rows); ++r) {
      if (places[r] < 0) break;
      T* to = hidden + places[r] * kStride + 2 * lane;
      const float2 pair = load_pair(to);
      float values[2] = {pair.x, pair.y};
      for (int i = 0; i < 2; ++i) {
        if (!p.norms_follow_activation) values[i] = values[i] * at_channel(kScale1, i) + at_channel(kShift1, i);
        values[i] = activate(p.hidden_activation, values[i]);
        if (p.norms_follow_activation) values[i] = values[i] * at_channel(kScale1, i) + at_channel(kShift1, i);
      }
      store_pair(to, values[0], values[1]);
    }
    __syncthreads();

    float2 results[kResultsOfWarp];
    int from[kResultsOfWarp];
    for (int i = 0; i < kResultsOfWarp; ++i) {
      results[i] = make_float2(at_channel(kFilterBias, 0), at_channel(kFilterBias, 1));
      from[i] = corners[kWarps * i + warp];
    }
    add_filtered(results, hidden, kStride, at.patch_width, from, channels + kTaps * kHiddenChunk, p.kernel);
#pragma unroll
    for (int i = 0; i < kResultsOfWarp; ++i) {
      const float2 pair = load_pair(hidden + (from[i] + halo * at.patch_width + halo) * kStride + 2 * lane);
      const float input[2] = {pair.x, pair.y};
      float values[2] = {results[i].x, results[i].y};
      for (int j = 0; j < 2; ++j) {
        if (p.adds_before) values[j] += input[j];
        if (!p.norms_follow_activation) values[j] = values[j] * at_channel(kScale2, j) + at_channel(kShift2, j);
        values[j] = activate(p.activation, values[j]);
        if (p.norms_follow_activation) values[j] = values[j] * at_channel(kScale2, j) + at_channel(kShift2, j);
        if (p.adds_after) values[j] += input[j];
        if (2 * lane + j >= count) values[j] = 0.0f;
      }
      store_pair(filtered + (kWarps * i + warp) * kStride + 2 * lane, values[0], values[1]);
    }
    __syncthreads();

#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int column = panel * kColumns;
      if (column >= columns) break;
      const T* weight = static_cast<const T*>(p.project.weight) + int64_t{first_column + column} * p.project.in + first;
      multiply_by_weight<kGroups>(sums[panel], filtered + rows * kStride, kStride, weight, count, p.project.in,
                                  columns - column, p.vectors, staging, group);
    }
  }

  // The row that a result is in, negative beyond the tile and the map.
  const auto row_of = [&](int result) {
    const int y = top + result / p.tile_width, c = left + result % p.tile_width;
    const bool here = result < p.tile_height * p.tile_width && y < p.height && c < p.width;
    return here ? first_pixel + y * p.width + c : int64_t{-1};
  };
  SpreadSums spread;
  // Every warp is past its last look at the hidden channels: their tiles take the results on their way out.
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const int of_panel = first_column + panel * kColumns, width = columns - panel * kColumns;
    if (width <= 0) break;
    const int column = of_panel + group * kPanel, count = width - group * kPanel;
    float *scales = channels, *shifts = channels + kColumns;
    if (p.norms[2].mean.data) {
      for (int c = threadIdx.x; c < min(kColumns, width); c += kThreads) {
        scales[c] = scale_of<T>(p.norms[2], of_panel + c);
        shifts[c] = shift_of<T>(p.norms[2], of_panel + c, scales[c]);
      }
      __syncthreads();
    }
    if (count > 0) {
      add_bias<T>(sums[panel], p.project.bias, column, count);
      if (p.norms[2].mean.data)
        for_each_pair(sums[panel], 0, [&](int, int c, float* values) {
          for (int i = 0; i < 2; ++i) {
            const int own_column = group * kPanel + min(c + i, count - 1);
            values[i] = values[i] * scales[own_column] + shifts[own_column];
          }
        });
      T* tile = hidden + rows * kOutStride + group * kPanel;
      put_tile(sums[panel], tile, kOutStride, count, kPanel);
      __syncwarp();
      write_rows(
          tile, kOutStride, min(count, kPanel), p.out, p.out_dtype, p.residual,
          [&](int r) {
            const int64_t row = row_of(rows + r);
            return row < 0 ? row : row * p.project.out + column;
          },
          [&](float value) { spread.add(value); });
    }
    __syncthreads();
    if (p.sums) {
      for (int c = threadIdx.x; c < min(kColumns, width); c += kThreads) {
        float sum = 0.0f;
        for (int result = 0; result < p.tile_height * p.tile_width; ++result)
          if (row_of(result) >= 0) sum += to_float(hidden[result * kOutStride + c]);
        p.sums[int64_t{tile_index} * p.project.out + of_panel + c] = sum;
      }
      __syncthreads();
    }
  }

  if (p.moments) {
    const Spread all = merge_block(spread.result(), reinterpret_cast<Spread*>(memory));
    if (threadIdx.x == 0) reinterpret_cast<Spread*>(p.moments)[blockIdx.x] = all;
  }
}

template <class T>
const char* launch_for(const DepthwiseMlp& p, void* stream) {
  constexpr int kMostPanels = most_columns(sizeof(T) == 4 ? kF32 : kBF16) / kColumns;
  const auto kernel = p.columns <= kColumns       ? depthwise_mlp_kernel<T, 1>
                      : p.columns <= 3 * kColumns ? depthwise_mlp_kernel<T, 3>
                                                  : depthwise_mlp_kernel<T, kMostPanels>;
  return launch_kernel(kernel, p.batch * blocks_per_sample(p), kThreads, layout_of<T>(p).end, stream, p);
}

}  // namespace

int64_t tiles_per_sample(const DepthwiseMlp& p) {
  return int64_t{parts(p.height, p.tile_height)} * parts(p.width, p.tile_width);
}

int64_t blocks_per_sample(const DepthwiseMlp& p) { return tiles_per_sample(p) * parts(p.project.out, p.columns); }

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
