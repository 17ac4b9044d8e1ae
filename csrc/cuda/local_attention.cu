// Attention inside windows. A block has 64 pixels of one window as queries, and meets the window's keys 64 at a time;
// where q, k and v are still to be made, the window is one such tile, and all three stay in shared memory.
#include "moments.h"
#include "rows.h"
#include "weights.h"

namespace fk {
namespace {

constexpr int kThreads = kTileRows / 16 * kWarp;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSpreadBytes = kWarps * 16;
constexpr int kSlots = 2;  // for tiles of weights
// A linear layer's share of a warp: 32 rows of 32 columns.
using Share = WarpShare<kWarps, 2, 2>;
constexpr int kRowTiles = 2;
static_assert(2 * Share::kRows == kTileRows);

// Where the parts of a block's shared memory begin, in bytes; `end` is its size.
struct Layout {
  int pixels, barred, x, q, k, v, attended, staging, end;
  int x_stride, q_stride, k_stride, v_stride, attended_stride;
};

template <class T>
__host__ __device__ Layout layout_of(const LocalAttention& p) {
  constexpr int kRowBytes = kTileRows * sizeof(T);
  const bool makes = p.qkv.weight != nullptr, projects = p.projection.weight != nullptr;
  Layout at;
  at.x_stride = tile_stride<T>(p.qkv.in);
  // The queries' tile later holds results on their way out.
  at.q_stride = tile_stride<T>(max(max(p.head_width, p.value_width), projects ? kPanel : 0));
  at.k_stride = tile_stride<T>(p.head_width);
  at.v_stride = tile_stride<T>(round_up(p.value_width, 16));
  at.attended_stride = tile_stride<T>(p.projection.in);
  at.pixels = kSpreadBytes;
  const int places = round_up(p.window * p.window, kTileRows);
  at.barred = at.pixels + places * static_cast<int>(sizeof(int));
  at.x = at.barred + places * static_cast<int>(sizeof(int));
  at.q = at.x + (makes ? kRowBytes * at.x_stride : 0);
  at.k = at.q + kRowBytes * at.q_stride;
  at.v = at.k + kRowBytes * at.k_stride;
  at.attended = at.v + kRowBytes * at.v_stride;
  at.staging = at.attended + (projects ? kRowBytes * at.attended_stride : 0);
  at.end = at.staging + (makes || projects ? weight_tiles_bytes(kSlots) : 0);
  return at;
}

// A bias in units of log2. The lowest finite number is a common mask and must not become infinite.
__device__ float in_log2(float bias) {
  return fabsf(bias) == INFINITY ? bias : fminf(fmaxf(bias * kLog2E, -3e38f), 3e38f);
}

// One head's queries, keys and values after another's, then the projection: 64 rows of a weight at a time, each from
// its first channel to its last.
template <class T>
struct AttentionWeights {
  const LocalAttention* p;
  int head, last, part, row, depth;

  __device__ bool vectors() const { return p->weight_vectors; }
  __device__ WeightTile<T> next() {
    constexpr int kDepth = kStageBytes / sizeof(T);
    const bool makes = head < last;
    const Linear& linear = makes ? p->qkv : p->projection;
    const int rows = makes ? p->head_width : linear.out;
    if (!linear.weight || row >= rows) return {nullptr, 0, 0, 0};
    const int first = makes ? (part * p->heads + head) * p->head_width : 0;
    const WeightTile<T> tile = {static_cast<const T*>(linear.weight) + int64_t{first + row} * linear.in + depth,
                                rows - row, min(kDepth, linear.in - depth), linear.in};
    depth += kDepth;
    if (depth < linear.in) return tile;
    depth = 0;
    row += kWeightRows;
    if (!makes || row < rows) return tile;
    row = 0;
    part = part == 2 ? 0 : part + 1;
    if (part == 0) ++head;
    return tile;
  }
};

// A warp's share of 64 rows times the next 64 rows of a weight.
template <class T, class Weights>
__device__ void multiply(float (&sums)[kRowTiles][Share::kColumnTiles][4], const T* rows, int stride, int depth,
                         Weights& weights) {
  for (int i = 0; i < kRowTiles; ++i) clear(sums[i]);
#pragma unroll 1
  for (int k = 0; k < depth; k += Weights::kDepth) {
    const T* const from[kRowTiles] = {rows + Share::first_row() * stride + k,
                                      rows + (Share::first_row() + 16) * stride + k};
    multiply_tile(sums, from, stride, weights.next(), Share::first_column(), depth - k);
  }
}

// One head's queries, keys or values of the tile: x times the weight's rows from `first` on, and bias.
template <class T, class Weights>
__device__ void make_head(const LocalAttention& p, T* tile, int stride, const T* x, int x_stride, int first, int padded,
                          Weights& weights) {
  const int column = Share::first_column();
#pragma unroll 1
  for (int begin = 0; begin < padded; begin += kWeightRows) {
    const int count = p.head_width - begin - column;
    float sums[kRowTiles][Share::kColumnTiles][4];
    multiply(sums, x, x_stride, p.qkv.in, weights);
    if (padded - begin <= column) continue;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if (count > 0) add_bias<T>(sums[i], p.qkv.bias, first + begin + column, count);
      put_tile(sums[i], tile + (Share::first_row() + 16 * i) * stride + begin + column, stride, count,
               padded - begin - column);
    }
  }
}

// HAT-Net's first two stages leave room for two or three blocks of 16-bit values on a multiprocessor. At the third (320
// channels: 128 KiB) x, the heads' tiles and what was attended leave room for one: the projection needs all heads of a
// row.
template <class T, int kValueTiles>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 || kValueTiles > 8 ? 2 : 3)
    local_attention_kernel(const LocalAttention p) {
  using F = Fragments<T>;
  const Layout at = layout_of<T>(p);
  unsigned char* memory = shared_memory();
  int* pixels = reinterpret_cast<int*>(memory + at.pixels);
  int* barred = reinterpret_cast<int*>(memory + at.barred);
  T* x = reinterpret_cast<T*>(memory + at.x);
  T* q = reinterpret_cast<T*>(memory + at.q);
  T* k = reinterpret_cast<T*>(memory + at.k);
  T* v = reinterpret_cast<T*>(memory + at.v);
  T* attended = reinterpret_cast<T*>(memory + at.attended);

  const int area = p.window * p.window, tiles = parts(area, kTileRows);
  const int across = parts(p.width, p.window), down = parts(p.height, p.window);
  const int groups = parts(p.heads, p.heads_per_block);
  int64_t index = blockIdx.x;
  const int first_head = static_cast<int>(index % groups) * p.heads_per_block;
  index /= groups;
  const int first_query = static_cast<int>(index % tiles) * kTileRows;
  index /= tiles;
  const int left = static_cast<int>(index % across) * p.window;
  index /= across;
  const int top = static_cast<int>(index % down) * p.window;
  const int sample = static_cast<int>(index / down);
  const int64_t first_pixel = int64_t{sample} * p.height * p.width;
  const bool makes = p.qkv.weight != nullptr, projects = p.projection.weight != nullptr;
  const int last_head = min(first_head + p.heads_per_block, p.heads);
  using Source = AttentionWeights<T>;
  WeightTiles<T, Source, kSlots> weights(reinterpret_cast<T*>(memory + at.staging),
                                         Source{&p, makes ? first_head : last_head, last_head, 0, 0, 0});

  // Each place of the window as a pixel of the map, negative beyond the map and the window, and whether it is no key.
  for (int place = threadIdx.x; place < tiles * kTileRows; place += kThreads) {
    const int row = top + place / p.window, column = left + place % p.window;
    pixels[place] = place < area && row < p.height && column < p.width ? row * p.width + column : -1;
    barred[place] = place >= area || (p.masked && pixels[place] < 0);
  }
  __syncthreads();

  if (makes)
    fill_normalized_rows(x, at.x_stride, kTileRows, warp_index() * kRowsOfWarp<T>, kWarps * kRowsOfWarp<T>, p.x,
                         p.qkv.in, p.norm, sample, p.x.aligned && p.qkv.in % kVector<T> == 0,
                         [&](int r) { return pixels[r] < 0 ? int64_t{-1} : first_pixel + pixels[r]; });
  const int own = 16 * warp_index(), lane = lane_index();
  if (projects)
    for (int i = lane * kVector<T>; i < 16 * at.attended_stride; i += kWarp * kVector<T>)
      store_vector(attended + own * at.attended_stride + i, {});

  const int channels = p.heads * p.head_width, value_channels = p.heads * p.value_width;
  const int padded = round_up(p.head_width, F::kDepth), value_padded = round_up(p.value_width, 16);
  const bool out_vectors = reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && (!p.residual.data || p.residual.aligned);
  SpreadSums spread;
  for (int head = first_head; head < last_head; ++head) {
    const auto fill = [&](T* tile, int stride, const void* from, int64_t from_stride, int width, int padded_width,
                          int first) {
      fill_tile(tile, stride, kTileRows, width, padded_width, p.vectors,
                static_cast<const T*>(from) + first_pixel * from_stride + head * width,
                [&](int r) { return pixels[first + r] < 0 ? int64_t{-1} : pixels[first + r] * from_stride; });
    };
    if (makes) {
      // One after the other, not side by side: the kernel must fit the instruction cache.
#pragma unroll 1
      for (int part = 0; part < 3; ++part) {
        T* tile = part == 0 ? q : part == 1 ? k : v;
        const int stride = part == 0 ? at.q_stride : part == 1 ? at.k_stride : at.v_stride;
        make_head(p, tile, stride, x, at.x_stride, part * channels + head * p.head_width,
                  part < 2 ? padded : value_padded, weights);
      }
    } else {
      fill(q, at.q_stride, p.q, p.q_stride, p.head_width, padded, first_query);
    }

    float sums[kValueTiles][4];
    clear(sums);
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    for (int first_key = 0; first_key < area; first_key += kTileRows) {
      if (!makes) {
        fill(k, at.k_stride, p.k, p.k_stride, p.head_width, padded, first_key);
        fill(v, at.v_stride, p.v, p.v_stride, p.value_width, value_padded, first_key);
        end_copies();
        wait_for_copies<0>();
      }
      __syncthreads();

      float scores[kPanelTiles][4];
      clear(scores);
#pragma unroll 1
      for (int depth = 0; depth < padded; depth += F::kDepth) {
        const typename F::Left a = F::left(q + own * at.q_stride + depth, at.q_stride);
#pragma unroll
        for (int n = 0; n < kPanelTiles; n += 2) {
          typename F::Right b[2];
          F::right(b, k + n * 8 * at.k_stride + depth, at.k_stride);
          F::multiply(scores[n], a, b[0]);
          F::multiply(scores[n + 1], a, b[1]);
        }
      }

      for (int n = 0; n < kPanelTiles; ++n)
        for (int i = 0; i < 4; ++i) scores[n][i] *= p.scale * kLog2E;
      with_values<T>(p.bias, [&](const auto* bias) {
        for_each_pair(scores, first_query + own, [&](int query, int c, float* values) {
          const int64_t row = (int64_t{head} * area + min(query, area - 1)) * area;
          for (int i = 0; i < 2; ++i) values[i] += in_log2(to_float(bias[row + min(first_key + c + i, area - 1)]));
        });
      });
      float larger[2] = {largest[0], largest[1]};
      for_each_pair(scores, 0, [&](int r, int c, float* values) {
        for (int i = 0; i < 2; ++i) {
          values[i] = barred[first_key + c + i] ? -INFINITY : values[i];
          larger[r / 8] = fmaxf(larger[r / 8], values[i]);
        }
      });
      float shift[2];
      for (int i = 0; i < 2; ++i) {
        larger[i] = fmaxf(larger[i], __shfl_xor_sync(~0u, larger[i], 1));
        larger[i] = fmaxf(larger[i], __shfl_xor_sync(~0u, larger[i], 2));
        // While there was no key at all, -inf - -inf would be NaN.
        shift[i] = larger[i] == -INFINITY ? 0.0f : larger[i];
        const float rescale = exp2f(largest[i] - shift[i]);
        total[i] *= rescale;
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n) {
          sums[n][2 * i] *= rescale;
          sums[n][2 * i + 1] *= rescale;
        }
        largest[i] = larger[i];
      }
      for_each_pair(scores, 0, [&](int r, int, float* values) {
        for (int i = 0; i < 2; ++i) {
          values[i] = exp2f(values[i] - shift[r / 8]);
          total[r / 8] += values[i];
        }
      });

#pragma unroll
      for (int tile = 0; tile < kPanelTiles; tile += F::kTiles) {
        const typename F::Left a = F::left_of(scores + tile);
#pragma unroll
        for (int n = 0; n < kValueTiles; n += 2) {
          if (n * 8 >= value_padded) break;
          typename F::Right b[2];
          F::right_of_rows(b, v + tile * 8 * at.v_stride + n * 8, at.v_stride);
          F::multiply(sums[n], a, b[0]);
          F::multiply(sums[n + 1], a, b[1]);
        }
      }
      __syncthreads();
    }

    for (int i = 0; i < 2; ++i) {
      total[i] += __shfl_xor_sync(~0u, total[i], 1);
      total[i] += __shfl_xor_sync(~0u, total[i], 2);
    }
    for (int i = 0; i < 2; ++i) total[i] = 1.0f / total[i];
    for_each_pair(sums, 0, [&](int r, int, float* values) {
      for (int i = 0; i < 2; ++i) values[i] *= total[r / 8];
    });
    if (projects) {
      T* row = attended + own * at.attended_stride + head * p.value_width;
      const bool pairs = p.value_width % 2 == 0;
      for_each_pair(sums, 0, [&](int r, int c, const float* values) {
        T* to = row + r * at.attended_stride + c;
        if (pairs && c < p.value_width)
          store_pair(to, values[0], values[1]);
        else
          for (int i = 0; i < 2; ++i)
            if (c + i < p.value_width) to[i] = from_float<T>(values[i]);
      });
      continue;
    }
    put_tile(sums, q + own * at.q_stride, at.q_stride, p.value_width, p.value_width);
    __syncwarp();
    write_rows<kValueTiles * 8 / kVector<T>>(
        q + own * at.q_stride, at.q_stride, p.value_width, p.out, p.out_dtype, p.residual,
        out_vectors && p.value_width % kVector<T> == 0,
        [&](int r) {
          const int pixel = pixels[first_query + own + r];
          return pixel < 0 ? int64_t{-1} : (first_pixel + pixel) * value_channels + head * p.value_width;
        },
        [&](float value) { spread.add(value); });
    // A block with another head makes its queries, and `multiply` waits for all warps before they are put there.
  }

  if (projects)
#pragma unroll 1
    for (int begin = 0; begin < p.projection.out; begin += kWeightRows) {
      float sums[kRowTiles][Share::kColumnTiles][4];
      multiply(sums, attended, at.attended_stride, value_channels, weights);
      const int column = begin + Share::first_column(), count = min(p.projection.out - column, Share::kColumns);
      if (count <= 0) continue;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int first = Share::first_row() + 16 * i;
        T* tile = q + first * at.q_stride + Share::first_column();
        add_bias<T>(sums[i], p.projection.bias, column, count);
        put_tile(sums[i], tile, at.q_stride, count, Share::kColumns);
        __syncwarp();
        write_rows<Share::kColumns / kVector<T>>(
            tile, at.q_stride, count, p.out, p.out_dtype, p.residual, out_vectors && p.projection.out % kVector<T> == 0,
            [&](int r) {
              const int pixel = pixels[first_query + first + r];
              return pixel < 0 ? int64_t{-1} : (first_pixel + pixel) * p.projection.out + column;
            },
            [&](float value) { spread.add(value); });
      }
    }

  if (p.moments) {
    const Spread all = merge_block(spread.result(), reinterpret_cast<Spread*>(memory));
    if (threadIdx.x == 0) reinterpret_cast<Spread*>(p.moments)[blockIdx.x] = all;
  }
}

template <class T>
const char* launch_for(const LocalAttention& p, void* stream) {
  const auto kernel = p.value_width <= 64 ? local_attention_kernel<T, 8> : local_attention_kernel<T, 16>;
  return launch_kernel(kernel, p.batch * blocks_per_sample(p), kThreads, layout_of<T>(p).end, stream, p);
}

}  // namespace

int64_t blocks_per_sample(const LocalAttention& p) {
  return int64_t{parts(p.height, p.window)} * parts(p.width, p.window) * parts(p.window * p.window, kTileRows) *
         parts(p.heads, p.heads_per_block);
}

int64_t shared_bytes(const LocalAttention& p) {
  return (p.dtype == kF32 ? layout_of<float>(p) : layout_of<bf16>(p)).end;
}

const char* launch(const LocalAttention& p, void* stream) {
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
