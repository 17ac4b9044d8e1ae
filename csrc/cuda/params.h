// What the torch-facing files say to the kernels: plain structs, known to every compiler.
#pragma once

#include <cstdint>

namespace fk {

enum DType : int32_t { kF32, kBF16, kF16 };

inline constexpr int64_t size_of(DType dtype) { return dtype == kF32 ? 4 : 2; }

// A dense tensor in a dtype of its own; data null: absent.
struct Array {
  const void* data;
  DType dtype;
  bool aligned = false;  // begins at a multiple of 16 bytes
};

enum NormKind : int32_t { kNoNorm, kLayerNorm, kGroupNorm };

struct Norm {
  NormKind kind;
  Array weight, bias;
  float eps;
  const float* statistics;  // GroupNorm with one group: mean and variance of each sample
};

// A linear layer [out, in] in the compute dtype, row-major.
struct Linear {
  const void* weight;  // null: absent
  Array bias;
  int32_t out, in;
};

// Rows of a tile: the queries of a block, and the keys that it meets at a time.
constexpr int32_t kTileRows = 64;

struct LocalAttention {
  // Either what q, k and v are made from ...
  Array x;  // [B, H * W, qkv.in]
  Norm norm;
  Linear qkv;
  // ... or q, k and v themselves in the compute dtype, rows that lie `stride` values apart.
  const void *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  Array bias;         // [heads, window^2, window^2]
  Linear projection;  // of all heads of a row
  Array residual;
  void* out;  // [B, H * W, heads * value_width] or [B, H * W, projection.out]
  DType dtype, out_dtype;
  int32_t batch, height, width, window, heads, head_width, value_width;
  int32_t heads_per_block;
  float scale;
  bool masked;   // pixels beyond the map are no keys; otherwise they are keys of zeros (or of the bias of `qkv`)
  bool vectors;  // heads' rows of q, k and v can be copied 16 bytes at a time
  bool weight_vectors;
  float* moments;  // per block [3], see moments.h; null: not wanted
};

enum Activation : int32_t { kGelu, kQuickGelu, kSilu, kRelu, kIdentity };

// Batch normalisation by given statistics; mean.data null: absent.
struct BatchNorm {
  Array weight, bias, mean, variance;
  float eps;
};

// Pixels of a block's input, its results and the hidden channels that it has at a time.
constexpr int32_t kPatchRows = 128;
constexpr int32_t kMostSide = 8;
constexpr int32_t kHiddenChunk = 64;
// Channels of the result for which a block makes the hidden map once: its accumulators are all there is.
inline constexpr int32_t most_columns(DType dtype) { return dtype == kF32 ? 512 : 640; }

struct DepthwiseMlp {
  Array x;  // [B, prefix + H * W, expand.in]
  Norm norm;
  Linear expand, project;
  Array filter, filter_bias;     // [hidden, kernel, kernel], [hidden]
  BatchNorm norms[3];            // of the hidden map, of the filtered map, of the result
  bool norms_follow_activation;  // the first two
  Activation hidden_activation, activation;
  bool adds_before, adds_after;  // the filter's input, to its result before or after the activation
  Array residual;
  void* out;  // [B, prefix + H * W, project.out]; prefix rows are the residual's, or zeros
  DType dtype, out_dtype;
  int32_t batch, height, width, prefix, kernel;
  int32_t tile_height, tile_width, columns;  // results of a block
  int32_t down, across, slices;              // blocks of a sample: their tiles, and their columns
  bool vectors;                              // of the weights
  float* moments;                            // per block [3], without prefix rows; null: not wanted
  float* sums;  // of the results, without the residual, of each tile [B, tiles, project.out]; null: not wanted
};

// A GroupNorm of a finished map, and what is added behind it.
struct ResultNorm {
  Array y;  // [B, tokens, channels]
  Norm norm;
  Array residual;
  void* out;
  DType dtype, out_dtype;
  int32_t batch, tokens, prefix, channels;
  int32_t rows_per_block;
  float* moments;  // per block [3], without prefix rows; null: not wanted
};

struct MergeSums {
  const float* sums;  // [samples, parts, columns]
  Norm norm;          // a GroupNorm, of the mean
  float* means;       // [samples, columns]
  DType dtype;        // the compute dtype, which the norm's weight and bias may have
  int32_t samples, parts, columns, rows;
};

// Results of one branch that a block of a projection has at most.
constexpr int32_t kMostProjected = 128;
// Channels that are filtered at a time.
constexpr int32_t kFilteredChannels = 64;
// Shared memory that a multiprocessor keeps for itself, for each block.
constexpr int64_t kReservedShared = 1024;

struct ProjectionBranch {
  Array filter;  // [C, 1, kernel, kernel]
  BatchNorm norm;
  Linear linear;
  int32_t kernel, stride, padding, out_height, out_width;
  int32_t tile_height, tile_width;  // results of a block
  void* out;                        // [B, P + out_height * out_width, linear.out]
};

// Branches whose results a block makes together.
struct ProjectionSet {
  int32_t first, count;
  int32_t down, across;               // blocks of a sample
  int32_t patch_height, patch_width;  // of the largest patch
};

struct ConvProjection {
  Array x;  // [B, P + H * W, C]
  Norm norm;
  ProjectionBranch branches[3];
  ProjectionSet set[3];
  int32_t sets;
  DType dtype;
  int32_t batch, height, width, channels, prefix;
  bool vectors;  // of the weights
};

struct Moments {
  Array x;  // [samples, rows, columns], rows of a sample one after another
  int64_t sample_stride, values;
  int64_t values_per_part;
  int32_t samples, parts;
  float* moments;
};

struct MergeMoments {
  const float* moments;  // [samples, parts, 3]
  float* statistics;     // [samples, 2]: mean and biased variance
  int32_t samples, parts;
};

// Shared memory that the current device lets a block have, and its multiprocessors; what is returned is null, or what
// CUDA said.
const char* most_shared_memory(int64_t* to);
const char* multiprocessors(int64_t* to);

// Every launch returns null, or what CUDA said.
const char* launch(const LocalAttention& p, void* stream);
const char* launch(const DepthwiseMlp& p, void* stream);
const char* launch(const ConvProjection& p, void* stream);
const char* launch(const Moments& p, void* stream);
const char* launch(const MergeMoments& p, void* stream);
const char* launch(const ResultNorm& p, void* stream);
const char* launch(const MergeSums& p, void* stream);

int64_t blocks_per_sample(const LocalAttention& p);
int64_t shared_bytes(const LocalAttention& p);
// The largest tile whose block finds room in so many bytes of shared memory, or one result, and how many of the
// result's channels a block makes.
void choose_tile(DepthwiseMlp& p, int64_t most);
// Bytes of x and of weights that a block reads at most.
int64_t read_bytes(const DepthwiseMlp& p);
int64_t tiles_per_sample(const DepthwiseMlp& p);
int64_t blocks_per_sample(const DepthwiseMlp& p);
int64_t shared_bytes(const DepthwiseMlp& p);
int64_t shared_bytes(const ConvProjection& p);
int64_t shared_bytes(const ConvProjection& p, const ProjectionSet& set);
// Rows that a block's warps multiply for the results of a branch.
int32_t projected_rows(const ProjectionBranch& b);
// Bytes of x and of weights that a block of the set reads, as far as these lie within the map.
int64_t read_bytes(const ConvProjection& p, const ProjectionSet& set);
// Which branches share blocks, and how large these are, for blocks with so many bytes of shared memory and a GPU with
// so many multiprocessors: the smallest blocks where none finds room.
void choose_sets(ConvProjection& p, int64_t most, int64_t processors);
// Sets the sides of the set's largest patch.
void measure_patch(const ConvProjection& p, ProjectionSet& set);

}  // namespace fk
