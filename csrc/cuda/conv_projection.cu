// Depthwise convolutions of normalised tokens, each in front of a linear layer: a block filters a patch of the map, 64
// channels at a time, for 64 results of one branch, which stay in registers. Blocks of one patch are neighbours, so
// that the second and third branch find it in the cache. Prefix tokens, which are not filtered, have blocks of their
// own.
#include "depthwise.h"

namespace fk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroups = 2;
constexpr int kColumns = kGroups * kPanel;
constexpr int kResultsOfWarp = kTileRows / kWarps;

// Of the channels in work, factor and shift of the batch norm.
enum Row { kScale, kShift, kTaps };

__host__ __device__ int patch_side(const ProjectionBranch& b, int results) {
  return (results - 1) * b.stride + b.kernel;
}

__host__ __device__ int blocks_of(const ProjectionBranch& b) {
  return parts(b.out_height, b.tile_height) * parts(b.out_width, b.tile_width);
}

// Where the parts of a block's shared memory begin, in bytes; `end` is its size.
struct Layout {
  int rows, spreads, channels, patch, filtered, staging, end;
};

template <class T>
__host__ __device__ Layout layout_of(const ConvProjection& p) {
  constexpr int kRowBytes = tile_stride<T>(kChannels) * sizeof(T);
  int patch = 0, taps = 0;
  for (const ProjectionBranch& b : p.branches) {
    patch = max(patch, patch_side(b, b.tile_height) * patch_side(b, b.tile_width));
    taps = max(taps, b.kernel * b.kernel);
  }
  // Results leave through the patch's tile.
  const int bytes = max(patch * kRowBytes, kTileRows * tile_stride<T>(kColumns) * static_cast<int>(sizeof(T)));
  Layout at;
  at.rows = 0;
  at.spreads = at.rows + round_up(max(patch, kTileRows), 4) * static_cast<int>(sizeof(int));
  at.channels = at.spreads + round_up(max(patch, kTileRows), 2) * static_cast<int>(sizeof(float2));
  at.patch = at.channels + (kTaps + taps) * kChannels * static_cast<int>(sizeof(float));
  at.filtered = at.patch + bytes;
  at.staging = at.filtered + kTileRows * kRowBytes;
  at.end = at.staging + kGroups * static_cast<int>(kStagingBytes);
  return at;
}

// Mean and factor of a row's LayerNorm.
template <class T>
__device__ float2 spread_of(const ConvProjection& p, int64_t row) {
  if (p.norm.kind == kNoNorm) return make_float2(0.0f, 1.0f);
  const int64_t first = row * p.channels;
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
  for (int c = lane_index(); c < p.channels; c += kWarp) sum += load<T>(p.x, first + c);
  const float mean = warp_sum(sum) / p.channels;
#pragma unroll 1
  for (int c = lane_index(); c < p.channels; c += kWarp) {
    const float deviation = load<T>(p.x, first + c) - mean;
    squares += deviation * deviation;
  }
  return make_float2(mean, rsqrtf(warp_sum(squares) / p.channels + p.norm.eps));
}

template <class T, int kPanels>
__global__ void __launch_bounds__(kThreads, 1) conv_projection_kernel(const ConvProjection p) {
  const Layout at = layout_of<T>(p);
  constexpr int kStride = tile_stride<T>(kChannels);
  constexpr int kOutStride = tile_stride<T>(kColumns);
  unsigned char* memory = shared_memory();
  int* rows = reinterpret_cast<int*>(memory + at.rows);
  float2* spreads = reinterpret_cast<float2*>(memory + at.spreads);
  float* channels = reinterpret_cast<float*>(memory + at.channels);
  T* patch = reinterpret_cast<T*>(memory + at.patch);
  T* filtered = reinterpret_cast<T*>(memory + at.filtered);
  T* staging = reinterpret_cast<T*>(memory + at.staging);

  // Which branch, and which of its results.
  int per_sample = 0;
  for (const ProjectionBranch& b : p.branches) per_sample += blocks_of(b);
  const int on_maps = p.batch * per_sample, block = static_cast<int>(blockIdx.x);
  const bool filters = block < on_maps;
  const int prefixes = p.batch * p.prefix, tokens = p.prefix + p.height * p.width;
  int branch = 0, index = 0, sample = 0;
  if (filters) {
    sample = block / per_sample;
    index = block % per_sample;
    while (index >= blocks_of(p.branches[branch])) index -= blocks_of(p.branches[branch++]);
  } else {
    const int each = parts(prefixes, kTileRows);
    branch = (block - on_maps) / each;
    index = (block - on_maps) % each * kTileRows;
  }
  const ProjectionBranch& b = p.branches[branch];
  const int across = parts(b.out_width, b.tile_width);
  const int left = index % across * b.tile_width, top = index / across * b.tile_height;
  const int patch_width = patch_side(b, b.tile_width);
  const int patch_rows = filters ? patch_side(b, b.tile_height) * patch_width : kTileRows;
  const int64_t first_row = int64_t{sample} * tokens;

  // Rows of the patch as tokens of all samples' (from this sample's first one where they are filtered), negative
  // beyond.
  const int lane = lane_index(), warp = warp_index();
  for (int r = warp; r < patch_rows; r += kWarps) {
    int row = -1;
    if (filters) {
      const int y = top * b.stride - b.padding + r / patch_width, c = left * b.stride - b.padding + r % patch_width;
      if (y >= 0 && y < p.height && c >= 0 && c < p.width) row = p.prefix + y * p.width + c;
    } else if (index + r < prefixes) {
      row = index + r;
    }
    if (lane == 0) rows[r] = row;
    if (row < 0) continue;
    const float2 spread =
        spread_of<T>(p, filters ? first_row + row : int64_t{row / p.prefix} * tokens + row % p.prefix);
    if (lane == 0) spreads[r] = spread;
  }

  const int own = 16 * (warp / kGroups), group = warp % kGroups;
  int corners[kResultsOfWarp];
  for (int i = 0; i < kResultsOfWarp; ++i) {
    const int result = kWarps * i + warp;
    corners[i] = result < b.tile_height * b.tile_width
                     ? result / b.tile_width * b.stride * patch_width + result % b.tile_width * b.stride
                     : 0;
  }

  float sums[kPanels][kPanelTiles][4];
  for (int panel = 0; panel < kPanels; ++panel) clear(sums[panel]);
#pragma unroll 1
  for (int first = 0; first < p.channels; first += kChannels) {
    const int count = min(kChannels, p.channels - first);
    if (filters)
      for (int c = threadIdx.x; c < kChannels; c += kThreads) {
        const int channel = first + min(c, count - 1), taps = b.kernel * b.kernel;
        const float scale = scale_of<T>(b.norm, channel);
        channels[kScale * kChannels + c] = scale;
        channels[kShift * kChannels + c] = shift_of<T>(b.norm, channel, scale);
        for (int tap = 0; tap < taps; ++tap)
          channels[(kTaps + tap) * kChannels + c] = load<T>(b.filter, int64_t{channel} * taps + tap);
      }
    __syncthreads();

    // The normalised tokens; those that are not filtered are what the linear layer takes.
    T* to = filters ? patch : filtered;
#pragma unroll 1
    for (int r = warp; r < patch_rows; r += kWarps) {
      float values[2] = {0.0f, 0.0f};
      if (rows[r] >= 0) {
        const int64_t row = filters ? first_row + rows[r] : int64_t{rows[r] / p.prefix} * tokens + rows[r] % p.prefix;
        for (int i = 0; i < 2; ++i) {
          const int channel = first + 2 * lane + i;
          if (channel >= p.channels) break;
          values[i] = (load<T>(p.x, row * p.channels + channel) - spreads[r].x) * spreads[r].y;
          values[i] = values[i] * load_or<T>(p.norm.weight, channel, 1.0f) + load_or<T>(p.norm.bias, channel, 0.0f);
        }
      }
      store_pair(to + r * kStride + 2 * lane, values[0], values[1]);
    }
    __syncthreads();

    if (filters) {
      float2 results[kResultsOfWarp];
      for (int i = 0; i < kResultsOfWarp; ++i) results[i] = make_float2(0.0f, 0.0f);
      add_filtered(results, patch, kStride, patch_width, corners, channels + kTaps * kChannels, b.kernel);
      const float2 scale = load_pair(channels + kScale * kChannels + 2 * lane);
      const float2 shift = load_pair(channels + kShift * kChannels + 2 * lane);
#pragma unroll
      for (int i = 0; i < kResultsOfWarp; ++i)
        store_pair(filtered + (kWarps * i + warp) * kStride + 2 * lane,
                   2 * lane < count ? results[i].x * scale.x + shift.x : 0.0f,
                   2 * lane + 1 < count ? results[i].y * scale.y + shift.y : 0.0f);
    }
    __syncthreads();

#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int column = panel * kColumns;
      if (column >= b.linear.out) break;
      const T* weight = static_cast<const T*>(b.linear.weight) + int64_t{column} * p.channels + first;
      multiply_by_weight<kGroups>(sums[panel], filtered + own * kStride, kStride, weight, count, p.channels,
                                  b.linear.out - column, p.vectors, staging, group);
    }
  }

  const int64_t out_tokens = p.prefix + int64_t{b.out_height} * b.out_width;
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const int column = panel * kColumns + group * kPanel, count = b.linear.out - column;
    if (count <= 0) continue;
    add_bias<T>(sums[panel], b.linear.bias, column, count);
    T* tile = patch + own * kOutStride + group * kPanel;
    put_tile(sums[panel], tile, kOutStride, count, kPanel);
    __syncwarp();
    write_rows(
        tile, kOutStride, min(count, kPanel), b.out, p.dtype, Array{nullptr, kF32},
        [&](int r) {
          const int result = own + r;
          int64_t row = -1;
          if (filters) {
            const int y = top + result / b.tile_width, c = left + result % b.tile_width;
            if (result < b.tile_height * b.tile_width && y < b.out_height && c < b.out_width)
              row = sample * out_tokens + p.prefix + int64_t{y} * b.out_width + c;
          } else if (index + result < prefixes) {
            row = (index + result) / p.prefix * out_tokens + (index + result) % p.prefix;
          }
          return row < 0 ? row : row * b.linear.out + column;
        },
        [](float) {});
    __syncwarp();
  }
}

template <class T>
const char* launch_for(const ConvProjection& p, void* stream) {
  int64_t per_sample = 0, widest = 0;
  for (const ProjectionBranch& b : p.branches) {
    per_sample += blocks_of(b);
    if (b.linear.out > widest) widest = b.linear.out;
  }
  const int64_t blocks = p.batch * per_sample + 3 * parts(int64_t{p.batch} * p.prefix, kTileRows);
  const auto kernel = widest <= kColumns ? conv_projection_kernel<T, 1> : conv_projection_kernel<T, 3>;
  return launch_kernel(kernel, blocks, kThreads, layout_of<T>(p).end, stream, p);
}

}  // namespace

int64_t shared_bytes(const ConvProjection& p) {
  return (p.dtype == kF32 ? layout_of<float>(p) : layout_of<bf16>(p)).end;
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
