// The MLP with a depthwise convolution in it, on chip: a block has a patch of the map as its input, and makes 64 hidden
// channels of it at a time, filters them, and adds what they give to its results, which stay in registers.
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

// Where the parts of a block's shared memory begin, in bytes; `end` is its size.
struct Layout {
  int pixels, channels, x, hidden, filtered, staging, end;
  int x_stride;
};

template <class T>
__host__ __device__ Layout layout_of(const DepthwiseMlp& p) {
  constexpr int kHiddenBytes = tile_stride<T>(kHiddenChunk) * sizeof(T);
  static_assert(kTileRows * tile_stride<T>(kColumns) <= kPatchRows * tile_stride<T>(kHiddenChunk),
                "results leave through the hidden channels' tile");
  Layout at;
  at.x_stride = tile_stride<T>(p.expand.in);
  at.pixels = kSpreadBytes;
  at.channels = at.pixels + kPatchRows * static_cast<int>(sizeof(int));
  at.x = at.channels + (kTaps + p.kernel * p.kernel) * kHiddenChunk * static_cast<int>(sizeof(float));
  at.hidden = at.x + kPatchRows * at.x_stride * static_cast<int>(sizeof(T));
  at.filtered = at.hidden + kPatchRows * kHiddenBytes;
  at.staging = at.filtered + kTileRows * kHiddenBytes;
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
  int* pixels = reinterpret_cast<int*>(memory + at.pixels);
  float* channels = reinterpret_cast<float*>(memory + at.channels);
  T* x = reinterpret_cast<T*>(memory + at.x);
  T* hidden = reinterpret_cast<T*>(memory + at.hidden);
  T* filtered = reinterpret_cast<T*>(memory + at.filtered);
  T* staging = reinterpret_cast<T*>(memory + at.staging);

  const int across = (p.width + p.tile_width - 1) / p.tile_width;
  const int down = (p.height + p.tile_height - 1) / p.tile_height;
  const int left = static_cast<int>(blockIdx.x) % across * p.tile_width;
  const int top = static_cast<int>(blockIdx.x) / across % down * p.tile_height;
  const int sample = static_cast<int>(blockIdx.x) / across / down;
  const int64_t first_pixel = int64_t{sample} * p.height * p.width;
  const int halo = p.kernel / 2, taps = p.kernel * p.kernel;
  const int patch_width = p.tile_width + 2 * halo;
  const int patch = (p.tile_height + 2 * halo) * patch_width;

  // Each row of the patch as a pixel of the map, negative beyond both.
  for (int row = threadIdx.x; row < kPatchRows; row += kThreads) {
    const int y = top - halo + row / patch_width, c = left - halo + row % patch_width;
    pixels[row] = row < patch && y >= 0 && y < p.height && c >= 0 && c < p.width ? y * p.width + c : -1;
  }
  __syncthreads();
  fill_normalized_rows(x, at.x_stride, p.x, p.expand.in, p.norm, sample,
                       [&](int r) { return pixels[r] < 0 ? int64_t{-1} : first_pixel + pixels[r]; });

  const int lane = lane_index(), warp = warp_index(), own = 16 * warp;
  const int rows = 16 * (warp / kGroups), group = warp % kGroups;
  // The corner of the patch that the filter begins at for each of this warp's results.
  int corners[kResultsOfWarp];
  for (int i = 0; i < kResultsOfWarp; ++i) {
    const int result = kWarps * i + warp;
    corners[i] =
        result < p.tile_height * p.tile_width ? result / p.tile_width * patch_width + result % p.tile_width : 0;
  }

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
      multiply_by_weight<1>(expanded, x + own * at.x_stride, at.x_stride, weight, p.expand.in, p.expand.in, count,
                            p.vectors, staging);
      add_bias<T>(expanded, p.expand.bias, first, count);
      put_tile(expanded, hidden + own * kStride, kStride, count, kHiddenChunk);
    }
    __syncwarp();

    const auto at_channel = [&](int row, int i) { return channels[row * kHiddenChunk + 2 * lane + i]; };
    // Beyond the map the filter finds zeros.
#pragma unroll 1
    for (int r = own; r < own + 16; ++r) {
      T* to = hidden + r * kStride + 2 * lane;
      const float2 pair = load_pair(to);
      float values[2] = {pair.x, pair.y};
      for (int i = 0; i < 2; ++i) {
        if (!p.norms_follow_activation) values[i] = values[i] * at_channel(kScale1, i) + at_channel(kShift1, i);
        values[i] = activate(p.hidden_activation, values[i]);
        if (p.norms_follow_activation) values[i] = values[i] * at_channel(kScale1, i) + at_channel(kShift1, i);
        if (pixels[r] < 0) values[i] = 0.0f;
      }
      store_pair(to, values[0], values[1]);
    }
    __syncthreads();

    float2 results[kResultsOfWarp];
    for (int i = 0; i < kResultsOfWarp; ++i)
      results[i] = make_float2(at_channel(kFilterBias, 0), at_channel(kFilterBias, 1));
    add_filtered(results, hidden, kStride, patch_width, corners, channels + kTaps * kHiddenChunk, p.kernel);
#pragma unroll
    for (int i = 0; i < kResultsOfWarp; ++i) {
      const float2 pair = load_pair(hidden + (corners[i] + halo * patch_width + halo) * kStride + 2 * lane);
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
      if (column >= p.project.out) break;
      const T* weight = static_cast<const T*>(p.project.weight) + int64_t{column} * p.project.in + first;
      multiply_by_weight<kGroups>(sums[panel], filtered + rows * kStride, kStride, weight, count, p.project.in,
                                  p.project.out - column, p.vectors, staging, group);
    }
  }

  SpreadSums spread;
  // Every warp is past its last look at the hidden channels: their tile takes the results on their way out.
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const int column = panel * kColumns + group * kPanel, count = p.project.out - column;
    float *scales = channels, *shifts = channels + kColumns;
    if (p.norms[2].mean.data) {
      for (int c = threadIdx.x; c < min(kColumns, p.project.out - panel * kColumns); c += kThreads) {
        scales[c] = scale_of<T>(p.norms[2], panel * kColumns + c);
        shifts[c] = shift_of<T>(p.norms[2], panel * kColumns + c, scales[c]);
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
            const int result = rows + r, y = top + result / p.tile_width, c = left + result % p.tile_width;
            const bool here = result < p.tile_height * p.tile_width && y < p.height && c < p.width;
            return here ? (first_pixel + int64_t{y} * p.width + c) * p.project.out + column : int64_t{-1};
          },
          [&](float value) { spread.add(value); });
    }
    __syncthreads();
  }

  if (p.moments) {
    const Spread all = merge_block(spread.result(), reinterpret_cast<Spread*>(memory));
    if (threadIdx.x == 0) reinterpret_cast<Spread*>(p.moments)[blockIdx.x] = all;
  }
}

template <class T>
const char* launch_for(const DepthwiseMlp& p, void* stream) {
  const auto kernel = p.project.out <= kColumns ? depthwise_mlp_kernel<T, 1> : depthwise_mlp_kernel<T, 3>;
  return launch_kernel(kernel, p.batch * blocks_per_sample(p), kThreads, layout_of<T>(p).end, stream, p);
}

}  // namespace

int64_t blocks_per_sample(const DepthwiseMlp& p) {
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  return parts(p.height, p.tile_height) * parts(p.width, p.tile_width);
}

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
