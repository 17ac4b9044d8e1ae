// What the torch-facing files and the per-instruction-set kernels say to each other: plain structs and function
// pointers. No STL and no torch header may be included here: the kernel files are compiled for instruction sets that
// the machine may lack, and an inline function shared with other files could be picked from the wrong one at link time.
#pragma once

#include <stdint.h>

enum fk_dtype { FK_F32 = 0, FK_BF16 = 1 };

enum fk_activation { FK_GELU = 0, FK_QUICK_GELU = 1, FK_SILU = 2, FK_RELU = 3, FK_NO_ACTIVATION = 4 };

// The last one is no norm, only its weight and bias; patch_embedding takes it.
enum fk_norm_kind { FK_NO_NORM = 0, FK_LAYER_NORM = 1, FK_GROUP_NORM = 2, FK_AFFINE = 3 };

// A row-major matrix or vector as it comes from torch.
struct fk_array {
  const void* data;  // null: absent
  fk_dtype dtype;
  int64_t size;
};

// A linear layer in the layout of the microkernel: panels of `fk_table::panel` columns, K values deep.
struct fk_linear {
  const void* panels;
  const float* bias;  // padded with zeros to whole panels
  int64_t n, k;
  int32_t low_precision;  // panels hold bf16 pairs
  const void* parts;      // the panels once more, split for products in parts; null: not split
};

struct fk_norm {
  const float* weight;
  const float* bias;
  float eps;
  enum fk_norm_kind kind;
  const float* groups;  // GroupNorm with one group: of each image mean and 1 / standard deviation
};

// Rows of a tensor: of each image, `rows` behind the first `skipped`, `stride` values apart.
struct fk_moments {
  struct fk_array x;
  int64_t images, rows, skipped, columns;
  int64_t rows_per_task, tasks_per_image;
  double* sums;  // per task [3]; see isa/moments.h
};

struct fk_conv_branch {
  const float* filter;      // [taps, C], batch normalisation folded in
  const float* shift;       // [C]
  struct fk_linear linear;  // panels null: its rows are the result, of the products' type
  int64_t kernel, stride, padding, out_h, out_w;
  void* out;  // [B, P + out_h * out_w, N]; null: not wanted
};

struct fk_conv_projection {
  struct fk_array x;  // [B, P + H * W, C]
  struct fk_norm norm;
  struct fk_conv_branch branch[3];
  int64_t batch, height, width, channels, prefix;
  int64_t rows_per_task, tasks_per_image;
  fk_dtype out_dtype;
  double* statistics;  // per task [3, 2, C]: sum and centred sum of squares of the depthwise outputs; null: project
};

struct fk_global_attention {
  struct fk_array q, k, v, residual;
  int64_t q_stride, k_stride, v_stride;  // between rows; images follow each other without a gap
  void* out;
  fk_dtype out_dtype;
  struct fk_norm norm;                 // of the rows of q
  struct fk_linear query, projection;  // panels null: none
  const float* bias;                   // [heads][keys][bias_stride], in units of log2; null: none
  int64_t bias_stride;
  int32_t add_query_input;
  double* moments;  // per task [3], of the result; null: not wanted
  int64_t batch, queries, keys, q_channels, channels, value_channels, heads;
  int64_t rows_per_task, tasks_per_image;
  float scale;
  int32_t low_precision;
};

struct fk_pointwise_mlp {
  struct fk_array x, residual;
  void* out;
  fk_dtype out_dtype;
  struct fk_norm norm;
  struct fk_linear expand, project;
  fk_activation activation;
  int64_t rows, channels, rows_per_task;
};

struct fk_patch_embedding {
  struct fk_array x;  // NHWC
  void* out;
  fk_dtype out_dtype;
  struct fk_linear linear;  // K is kernel * kernel * channels, in this order
  struct fk_norm in_norm;   // of each pixel of x
  fk_activation activation;
  const float *scale, *shift;  // of the activated result [N, padded]; null: none
  struct fk_norm norm;         // of the result
  int64_t batch, height, width, channels, kernel, stride, padding, out_h, out_w;
  int64_t rows_per_task, panels_per_task, panel_groups;  // several groups: there is no norm of the result
};

struct fk_head_tokens {
  struct fk_array x;  // [B, N, C]
  struct fk_norm norm;
  struct fk_linear linear;   // from a head's channels to all
  struct fk_norm head_norm;  // over a head's channels
  const float* pos_embed;    // [heads][C]
  void* out;                 // [B, N + heads, C]; null: only the sums are wanted
  fk_dtype out_dtype;
  int64_t batch, tokens, channels, heads;
  int64_t rows_per_task, tasks_per_image;
  float* sums;  // per task of the first step [C, padded to whole vectors]
};

// The class token with the mean of the head tokens, and the other tokens, on top of a residual.
struct fk_merge_head_tokens {
  struct fk_array x, residual;  // [B, rows + heads, C], [B, rows, C]
  void* out;                    // [B, rows, C]
  fk_dtype out_dtype;
  int64_t batch, rows, heads, channels, rows_per_task, tasks_per_image;
};

// The class token of each image, normalised and times a gate, added to that of the result. Its weights are few, and
// read where they lie.
struct fk_class_token {
  struct fk_array x;     // [B, rows, C], the class token first
  struct fk_array mean;  // [B, C]
  struct fk_array norm_weight, norm_bias;
  struct fk_array weight1, bias1, weight2, bias2;  // gate: activation between linears [hidden, C], [C, hidden]
  fk_activation activation;
  struct fk_array out;  // like x
  int64_t rows, channels, hidden;
  float eps;
  int32_t normed;
};

struct fk_pooled_projection {
  struct fk_array x;       // [B, H * W, C]
  struct fk_norm in_norm;  // of x, by its statistics
  struct fk_norm norm;     // of the pooled map
  struct fk_linear linear;
  float* pooled;  // [B, pooled_h * pooled_w, C], behind in_norm
  void* out;      // [B, pooled_h * pooled_w, N]
  fk_dtype out_dtype;
  int64_t batch, height, width, channels, kernel, pooled_h, pooled_w;
  int64_t pixels_per_pool, pools_per_image;              // tasks of the first step
  int64_t rows_per_task, tasks_per_image, panel_groups;  // tasks of the second
  double* moments;                                       // per task of the first step [3]; null: not wanted
};

struct fk_local_attention {
  struct fk_array x, k, v;  // [B, H * W, ...]; x holds q beside k and v, else what `qkv` takes, else q, k and v
  struct fk_array residual;
  void* out;
  fk_dtype out_dtype;
  struct fk_norm norm;
  struct fk_linear qkv, projection;  // panels null: none
  const float* bias;                 // [heads][g * g][bias_stride], in units of log2; null: none
  int64_t bias_stride;
  int64_t batch, height, width, in_channels, channels, value_channels, heads, window;
  int64_t windows_per_task, tasks_per_image;
  float scale;
  int32_t masked, low_precision;
  double* moments;  // per task [3], of the result; null: not wanted
};

struct fk_depthwise_conv {
  struct fk_array x;         // [B, H * W, C]
  struct fk_array residual;  // [B, out_h * out_w, C]
  void* out;                 // the same
  fk_dtype out_dtype;
  struct fk_norm norm;  // of each pixel of x
  const float* filter;  // [taps][C, padded], batch normalisation folded in
  const float* shift;   // [C, padded]
  int64_t batch, height, width, channels, kernel, stride, padding, out_h, out_w;
  int64_t rows_per_task, columns_per_task;  // of the result
};

struct fk_depthwise_mlp {
  struct fk_array x, residual;  // [B, P + H * W, C]
  void* out;                    // [B, P + H * W, N]
  fk_dtype out_dtype;
  struct fk_norm norm;
  struct fk_linear expand, project;  // batch normalisation next to a linear folded in
  const float* scale;                // of the activated hidden map [hidden, padded]; null: none
  const float* shift;
  const float* filter;       // [taps][hidden, padded]
  const float* filter_bias;  // [hidden, padded]
  enum fk_activation hidden_activation, activation;
  int32_t adds_hidden;  // the filter's input is added to the activated result
  int64_t batch, height, width, channels, prefix, kernel;
  int64_t rows_per_task, tasks_per_image;  // rows of the map
  int64_t chunk;                           // hidden channels at a time, a multiple of the panel
  float* raw;                              // [B, H * W, N]: the branch before its own GroupNorm; null: there is none
  int64_t slices;                          // tasks that share the hidden channels of a band; 1: every band is one task
  float* partial;                          // with several slices their sums [slices][B * H * W][sums_stride]; else null
  int64_t sums_stride;                     // N and padding
  // Tasks of the second step, which adds the slices up; with one slice bands take their place.
  int64_t pixels_per_sum, sums_per_image;
  double* moments;  // per sum [3], of the result (of raw where there is one); null: not wanted
  double* means;    // per sum [N], sums of the branch over pixels; null: not wanted
};

// out = GroupNorm(raw) + residual for rows of images.
struct fk_group_norm_rows {
  const float* raw;  // [B, rows, N]
  struct fk_array residual;
  void* out;  // [B, skipped + rows, N], like the residual
  fk_dtype out_dtype;
  struct fk_norm norm;
  int64_t rows, skipped, columns;
  int64_t rows_per_task, tasks_per_image;
  double* moments;  // per task [3], of the result; null: not wanted
};

// Batch normalisation per channel, for its backward. Vectors are padded with zeros.
struct fk_channel_norm {
  const float *mean, *rstd, *weight, *bias;  // mean null: there is no norm
  const float* rest;                         // what rounding took from `rstd`
  // Of the gradient, alone and times the normalised input, where both flow into batch statistics; null: they do not.
  const float *grad_mean, *grad_slope;
};

// out = BatchNorm(raw) + residual for rows of images.
struct fk_batch_norm_rows {
  const float* raw;  // [B, rows, N]
  struct fk_channel_norm norm;
  struct fk_array residual;
  void* out;  // [B, skipped + rows, N], like the residual
  fk_dtype out_dtype;
  int64_t rows, skipped, columns;
  int64_t rows_per_task, tasks_per_image;
  double* means;  // per task [N], sums of BatchNorm(raw); null: not wanted
};

// Sums of channels, and of their squares around the mean.
struct fk_channel_moments {
  const float* x;  // [images, skipped + rows, columns]
  int64_t rows, skipped, columns;
  double* sums;  // per image [2][columns]
};

// The gradient of a batch norm's input from that of its result.
struct fk_batch_norm_backward {
  const float* x;  // [images, skipped + rows, columns]
  float* grad;     // [images, rows, columns], replaced
  struct fk_channel_norm norm;
  const float* mean_rest;  // what rounding took from the norm's mean, padded
  int64_t rows, skipped, columns, rows_per_task, tasks_per_image;
  double* sums;  // per task [2][columns]
};

// Batch norm and activation of rows of channels; the norm's vectors are padded.
enum fk_norm_act_step { FK_NORM_ACT_MOMENTS, FK_NORM_ACT_RESULT, FK_NORM_ACT_SUMS, FK_NORM_ACT_INPUT };
struct fk_batch_norm_act {
  struct fk_array x, grad;  // [rows, columns]; of the result's gradient `out_dtype`
  struct fk_channel_norm norm;
  enum fk_activation activation;
  int32_t activation_first;
  int64_t rows, columns, rows_per_task;
  fk_dtype out_dtype;  // of the result, also where only its gradient is read
  void* out;           // [rows, columns]: the result, or the gradient of x in x's dtype
  // Per task: of what the norm meets the sums and the squares around their mean [2][columns]; or the gradient behind
  // the norm, alone and times the normalised value, and the latter [3][columns].
  double* sums;
};

// A weight matrix [n, k] to be packed; columns of the source may be permuted by `channels` (see pack.h).
struct fk_pack_linear {
  struct fk_array weight, bias;
  int64_t n, k;
  int32_t low_precision;
  int64_t taps;        // > 1: weight is [n, k / taps, taps] and is packed as [n, taps, k / taps]
  int32_t transposed;  // weight is [k, n, step], of which the first of each `step` values counts; no taps
  int64_t step;
  void* panels;
  float* packed_bias;
  void* parts;  // null: not wanted
};

// A gradient as partial sums [count], each in panels [ceil(columns / panel)][rows][panel] and `stride` values long.
struct fk_partial_sums {
  const float* partials;
  int64_t count, stride, rows, columns;
  int64_t taps;  // > 1: columns run over [taps, columns / taps] and are stored as [columns / taps, taps]
  void* out;     // [rows, columns]
  fk_dtype out_dtype;
  int32_t transposed;  // out is [columns, rows]; no taps
};

// Hidden channels that a step of depthwise_mlp's batch statistics takes at most.
enum { FK_MOST_STATISTICS_CHUNK = 128 };

// The gradient of a weight of depthwise_mlp from partial sums [count] `stride` apart of [rows][columns], rows being
// hidden channels. A task has FK_WEIGHT_TASK rows, or columns where the result is turned over.
enum { FK_WEIGHT_TASK = 16 };
struct fk_weight_sums {
  const float* partials;
  int64_t count, stride, rows, columns;
  const float* scale;  // [columns]; null: ones
  int32_t turned;
  void* out;  // [rows][out_stride], of which `width` are columns, or turned over [width][out_stride]
  fk_dtype out_dtype;
  int64_t width, out_stride;
};

// The gradients of pointwise_mlp. Null pointers: not wanted.
struct fk_pointwise_mlp_backward {
  struct fk_array x, grad;  // [rows, channels], [rows, out]
  struct fk_norm norm;
  struct fk_linear expand;     // of the hidden values
  struct fk_linear to_hidden;  // of their gradients: weight2 transposed
  struct fk_linear to_input;   // of the gradients of the normalised rows: weight1 transposed
  enum fk_activation activation;
  int64_t rows, channels, hidden, out;
  // Task [partial, slice]: a range of blocks of rows, and a range of panels of the hidden channels.
  int64_t rows_per_block, partials, slices, slice_panels, chunk_panels;
  float *weight1, *bias1, *weight2, *bias2, *affine;  // partial sums [partials]; affine: of the norm's weight and bias
  float* inputs;  // with several slices [slices][rows][channels]: their gradients of the normalised rows; else null
  void* dx;       // of x's dtype
  struct fk_array own;  // like dx, which it is added to: see Gradients; data null: nothing
  int32_t wants_input;  // dx or affine
};

// The gradients of patch_embedding. Null pointers: not wanted.
struct fk_patch_embedding_backward {
  struct fk_patch_embedding forward;  // without pointer to results; without a LayerNorm behind without weights, too
  struct fk_array grad;               // [batch * out_h * out_w, n]
  int32_t low_precision;
  int64_t rows_per_block, partials;
  float *weight, *bias, *affine;  // partial sums [partials]; affine: of the weight and bias of the LayerNorm behind
  // Gradients of the convolution's results, of the products' type, in a border of zeros.
  void* slopes;  // [batch, slope_h, slope_w, slope_stride]
  int64_t border_top, border_left, slope_h, slope_w, slope_stride;
  // The second step.
  const struct fk_linear* taps;  // of each tap its transposed weight, `channels` columns
  int64_t rows_per_band, bands;
  void* dx;          // of x's dtype
  float* in_affine;  // partial sums [batch * bands], of the LayerNorm in front
};

// The gradients of LayerNorm and linear, which may be absent. Null pointers: not wanted.
struct fk_linear_backward {
  struct fk_array x;     // [rows, k]; without norm and `weight` only its dtype counts
  struct fk_array grad;  // [rows, n]
  struct fk_norm norm;
  struct fk_linear to_input;  // the transposed weight; panels null: `grad` is the gradient of the normalised rows
  int32_t low_precision;
  int64_t rows, n, k, rows_per_block, partials;
  float *weight, *bias, *affine;  // partial sums [partials]; affine: of the norm's weight and bias
  void* dx;                       // of x's dtype
  struct fk_array own;            // like dx, which it is added to: see Gradients; data null: nothing
  // In their place the gradients of what the linear reads [rows, k], with `added` (data null: nothing); then `norm` is
  // of none of this step's concern but for `weight`.
  float* inputs;
  struct fk_array added;
};

// The gradient of a map from that of its pooled pixels.
struct fk_pool_backward {
  struct fk_pooled_projection forward;
  const float* slopes;  // [B, pooled_h * pooled_w, C]
  // Of a norm by the map's own statistics: mean and 1 / standard deviation, and the gradients of mean and variance,
  // each [B, 2]; null: none.
  const float *groups, *of_statistics;
  void* dx;  // of x's dtype
};

// The gradients of head_tokens around its linear.
struct fk_head_tokens_backward {
  struct fk_array x, grad;  // [B, N, C], [B, N + heads, C]
  struct fk_norm norm, head_norm;
  struct fk_array linear_result;  // [B * heads, C]
  float* head_slopes;             // the same: gradients behind head_norm
  const float* mean_grads;        // [B, C], of the tokens' mean
  int64_t batch, tokens, channels, heads;
  int64_t rows_per_task, tasks_per_image;
  void* dx;       // of x's dtype; null: not wanted
  float* affine;  // partial sums per task, of the norm's weight and bias; null: not wanted
};

struct fk_linear_forward {
  struct fk_array x;  // [rows, k]
  struct fk_norm norm;
  int64_t rows_per_image;   // for GroupNorm's statistics
  struct fk_linear linear;  // panels null: none
  int32_t low_precision;
  int64_t rows, n, k, rows_per_task;
  void* out;  // [rows, n], of the products' type
};

// The gradients of attention between projected queries, keys and values, for sets of them: images or windows. Null
// pointers: not wanted. Task [partial, head]: a range of sets.
struct fk_attention_backward {
  struct fk_array q, k, v;  // in rows `*_stride` apart
  struct fk_array grad;     // of the heads side by side [tokens, value_channels]
  int64_t q_stride, k_stride, v_stride;
  // Windows: the tokens of each set of an image, which has `tokens`; queries and keys are the same ones. Null: sets
  // follow each other.
  const int64_t* window_tokens;
  const float* mask;  // [sets_per_image, keys], added to the scores; null: none
  int64_t tokens, sets_per_image;
  const float* bias;  // as in fk_global_attention
  int64_t bias_stride;
  int64_t sets, partials, queries, keys, channels, value_channels, heads;
  float scale;
  int32_t low_precision;
  void* result;       // the heads side by side, of the products' type
  const void* added;  // to the result, like it; null: nothing
  void *dq, *dk, *dv;
  fk_dtype dq_dtype;  // dk and dv have the dtypes of k and v
  int64_t dq_stride, dk_stride, dv_stride;
  float* bias_sums;  // partial sums [partials][heads], each in panels [queries, padded][keys]
};

// The gradient of a norm's input, and of its affine parameters, from that of its result.
struct fk_norm_backward {
  struct fk_array x;  // [images, skipped + rows, columns]
  struct fk_norm norm;
  const float* grad;  // [parts][images * rows][grad_stride]; the parts are summed
  int64_t grad_stride, parts;
  void* out;            // like x; null: not wanted
  struct fk_array own;  // like x, added to `out`; data null: nothing
  int64_t images, rows, skipped, columns, rows_per_task, tasks_per_image;
  float* sums;          // per task [2][columns], of the gradients of weight and bias; null: not wanted
  double* totals;       // per task [2]: sums of grad * weight, alone and times the normalised x (GroupNorm)
  const double* means;  // per image [2]: the same over the whole image, divided by the number of values
};

// The gradient of a result, with what comes by way of each image's mean and variance.
struct fk_statistics_backward {
  struct fk_array grad, out;         // [images, rows, columns]
  const float *statistics, *slopes;  // [images, 2]: mean and variance, and their gradients
  int64_t images, rows, columns, rows_per_task;
  float* to;
};

// Sums over pixels per channel; the gradients of the filter's taps come behind them. Those of the filter's results
// count as the norm's where there is none.
enum fk_conv_sum { FK_CONV_GRADS, FK_CONV_GRADS_X, FK_CONV_X, FK_CONV_TAPS };

struct fk_conv_branch_backward {
  struct fk_channel_norm norm;
  const void* grad;  // of the norm's result behind the prefix, [B, P + out_h * out_w, C]; null: nothing wanted
  void* slopes;  // gradients of the filter's results in a border of zeros [B, slope_h, slope_w, C padded]; null: not
                 // wanted
  int64_t border, slope_h, slope_w;
  int32_t wants_filter;
};

// The gradients of depthwise convolutions and of the norm in front of them.
struct fk_conv_projection_backward {
  struct fk_conv_projection forward;  // filters without batch normalisation; linears and results are not used
  struct fk_conv_branch_backward branch[3];
  fk_dtype dtype;  // of the branches' gradients
  int32_t training;
  int64_t partials, kinds;
  double* sums;  // partial sums [partials][3][kinds][C padded], in the order of fk_conv_sum
  // The last step, a band of rows of the map.
  int64_t rows_per_band, bands;
  void* dx;             // of x's dtype; null: not wanted
  struct fk_array own;  // like dx, which it is added to: see Gradients; data null: nothing
  float* affine;        // partial sums [batch * bands], of the norm's weight and bias; null: not wanted
};

// Sums over pixels per hidden channel; the gradients of the filter's taps come behind them.
enum fk_mlp_sum {
  FK_SUM_FILTERED,
  FK_SUM_NORM2,
  FK_SUM_NORM2_X,
  FK_SUM_NORM2_HAT,
  FK_SUM_NORM2_SQUARE,
  FK_SUM_NORM1,
  FK_SUM_NORM1_X,
  FK_SUM_NORM1_HAT,
  FK_SUM_NORM1_SQUARE,
  FK_SUM_EXPANDED,
  FK_SUM_TAPS
};

struct fk_depthwise_mlp_backward {
  struct fk_array x;     // [B, P + H * W, C]
  struct fk_array grad;  // of the second linear's result, [B, grad_prefix + H * W, N]
  int64_t grad_prefix;
  struct fk_norm norm;
  struct fk_linear expand;                      // [hidden, C]
  struct fk_linear project_back;                // [hidden, N]: the second linear's transpose
  struct fk_linear expand_back;                 // [C, hidden]: the first one's
  const float *filter, *flipped, *filter_bias;  // [taps][hidden, padded]
  struct fk_channel_norm norm1, norm2;
  enum fk_activation hidden_activation, activation;
  // The inner residual, in front of the activation and behind it. The former as a weight on the filter's centre would
  // round alike at every pixel.
  int32_t adds_input, adds_hidden, norms_after_activation;
  // Gradients of the weights, of the normalised x, and of anything in front of the filter.
  int32_t wants_project, wants_filter, wants_expand, wants_input, wants_hidden;
  int64_t batch, height, width, channels, out, prefix, kernel;
  int64_t stack;  // images that are worked at together
  int64_t chunk, rows_per_band, groups, slices;
  int64_t first, rows;  // hidden channels that the partial sums are of
  char* const* stores;  // of each stack what steps leave to each other; null: one step does it all
  char* chunk_maps;     // the chunk's part of that, where all images are one stack; null: it lies in the store
  // What the first linear gave, [B][kept_planes][H * W][lanes]; null: it is computed again.
  void* kept;
  fk_dtype kept_dtype;
  int64_t kept_planes;
  // Of a forward with batch statistics only: the second linear, and its results [B, H * W, N]; null: not wanted.
  struct fk_linear project;
  float* branch;
  float* expand_sums;   // per group [rows][C, padded]: gradient of the first linear's weight
  float* project_sums;  // per group [rows][N, padded]: of the second one's, transposed
  double* sums;         // per group [FK_SUM_TAPS + taps][rows]
  float* normed_grad;   // per slice [B * H * W][C, padded]: gradient of the normalised x
};

struct fk_table {
  const char* name;
  int32_t lanes;          // floats of a vector
  int32_t panel;          // columns of a panel
  int32_t low_precision;  // bf16 products run in hardware
  int64_t (*scratch_conv_projection)(const struct fk_conv_projection*);
  void (*conv_projection)(const struct fk_conv_projection*, int64_t task, void* scratch);
  void (*conv_projection_backward)(const struct fk_conv_projection_backward*, int64_t partial, int32_t finish,
                                   void* scratch);
  int64_t (*scratch_conv_projection_input)(const struct fk_conv_projection_backward*);
  void (*conv_projection_input)(const struct fk_conv_projection_backward*, int64_t task, void* scratch);
  int64_t (*scratch_global_attention)(const struct fk_global_attention*);
  void (*global_attention)(const struct fk_global_attention*, int64_t task, void* scratch);
  int64_t (*scratch_pointwise_mlp)(const struct fk_pointwise_mlp*);
  void (*pointwise_mlp)(const struct fk_pointwise_mlp*, int64_t task, void* scratch);
  int64_t (*scratch_patch_embedding)(const struct fk_patch_embedding*);
  void (*patch_embedding)(const struct fk_patch_embedding*, int64_t task, void* scratch);
  int64_t (*scratch_normalize_tokens)(const struct fk_head_tokens*);
  void (*normalize_tokens)(const struct fk_head_tokens*, int64_t task, void* scratch);
  int64_t (*scratch_head_tokens)(const struct fk_head_tokens*);
  void (*head_tokens)(const struct fk_head_tokens*, int64_t image, void* scratch);
  void (*merge_head_tokens)(const struct fk_merge_head_tokens*, int64_t task);
  int64_t (*scratch_gate_class_token)(const struct fk_class_token*);
  void (*gate_class_token)(const struct fk_class_token*, int64_t image, void* scratch);
  void (*head_tokens_slopes)(const struct fk_head_tokens_backward*, int64_t row, void* scratch);
  int64_t (*scratch_head_tokens_backward)(const struct fk_head_tokens_backward*);
  void (*head_tokens_backward)(const struct fk_head_tokens_backward*, int64_t task, void* scratch);
  void (*pool)(const struct fk_pooled_projection*, int64_t task);
  void (*pool_backward)(const struct fk_pool_backward*, int64_t row);
  int64_t (*scratch_pooled_projection)(const struct fk_pooled_projection*);
  void (*pooled_projection)(const struct fk_pooled_projection*, int64_t task, void* scratch);
  int64_t (*scratch_local_attention)(const struct fk_local_attention*);
  void (*local_attention)(const struct fk_local_attention*, int64_t task, void* scratch);
  int64_t (*scratch_depthwise_conv)(const struct fk_depthwise_conv*);
  void (*depthwise_conv)(const struct fk_depthwise_conv*, int64_t task, void* scratch);
  int64_t (*scratch_depthwise_mlp)(const struct fk_depthwise_mlp*);
  void (*depthwise_mlp)(const struct fk_depthwise_mlp*, int64_t task, void* scratch);
  void (*depthwise_mlp_sum)(const struct fk_depthwise_mlp*, int64_t task);
  void (*group_norm_rows)(const struct fk_group_norm_rows*, int64_t task);
  void (*moments)(const struct fk_moments*, int64_t task);
  void (*add_partials)(const struct fk_partial_sums*, int64_t panel);
  void (*add_weight_sums)(const struct fk_weight_sums*, int64_t task);
  int64_t (*scratch_pointwise_mlp_backward)(const struct fk_pointwise_mlp_backward*);
  void (*pointwise_mlp_backward)(const struct fk_pointwise_mlp_backward*, int64_t task, void* scratch);
  void (*pointwise_mlp_backward_input)(const struct fk_pointwise_mlp_backward*, int64_t partial, void* scratch);
  int64_t (*scratch_patch_embedding_backward)(const struct fk_patch_embedding_backward*);
  void (*patch_embedding_backward)(const struct fk_patch_embedding_backward*, int64_t partial, void* scratch);
  int64_t (*scratch_patch_embedding_input)(const struct fk_patch_embedding_backward*);
  void (*patch_embedding_input)(const struct fk_patch_embedding_backward*, int64_t task, void* scratch);
  int64_t (*scratch_linear_backward)(const struct fk_linear_backward*);
  void (*linear_backward)(const struct fk_linear_backward*, int64_t partial, void* scratch);
  int64_t (*scratch_linear_forward)(const struct fk_linear_forward*);
  void (*linear_forward)(const struct fk_linear_forward*, int64_t task, void* scratch);
  int64_t (*scratch_attention_backward)(const struct fk_attention_backward*);
  void (*attention_backward)(const struct fk_attention_backward*, int64_t task, void* scratch);
  void (*pack_panel)(const struct fk_pack_linear*, int64_t panel);
  // Of a weight's panels in parts; 0 where products take fp32 as it is.
  int64_t (*part_bytes)(int64_t panels, int64_t k);
  void (*norm_backward_totals)(const struct fk_norm_backward*, int64_t task);
  void (*norm_backward)(const struct fk_norm_backward*, int64_t task);
  void (*statistics_backward)(const struct fk_statistics_backward*, int64_t task);
  int64_t (*store_depthwise_mlp_backward)(const struct fk_depthwise_mlp_backward*);
  int64_t (*chunk_maps_depthwise_mlp_backward)(const struct fk_depthwise_mlp_backward*);
  int64_t (*scratch_depthwise_mlp_backward)(const struct fk_depthwise_mlp_backward*);
  void (*depthwise_mlp_backward)(const struct fk_depthwise_mlp_backward*, int64_t task, void* scratch);
  int64_t (*store_depthwise_mlp_statistics)(const struct fk_depthwise_mlp_backward*);
  int64_t (*scratch_depthwise_mlp_statistics)(const struct fk_depthwise_mlp_backward*);
  void (*depthwise_mlp_statistics)(const struct fk_depthwise_mlp_backward*, int64_t step, int64_t image, void* scratch);
  void (*batch_norm_rows)(const struct fk_batch_norm_rows*, int64_t task, void* scratch);
  void (*channel_moments)(const struct fk_channel_moments*, int64_t image);
  void (*batch_norm_backward)(const struct fk_batch_norm_backward*, int64_t step, int64_t task);
  int64_t (*scratch_batch_norm_act)(const struct fk_batch_norm_act*);
  void (*batch_norm_act)(const struct fk_batch_norm_act*, enum fk_norm_act_step, int64_t task, void* scratch);
  void (*depthwise_mlp_backward_step)(const struct fk_depthwise_mlp_backward*, int64_t step, int64_t task,
                                      void* scratch);
  double (*peak)(int32_t low_precision, int64_t iterations);  // floating-point operations done
};

#ifdef __cplusplus
extern "C" {
#endif
// Memory of the calling thread, aligned to 64 bytes, until the next call; throws std::bad_alloc.
void* fk_block_memory(int64_t bytes) __attribute__((visibility("hidden")));
extern const struct fk_table fk_table_generic __attribute__((visibility("hidden")));
extern const struct fk_table fk_table_avx2 __attribute__((visibility("hidden")));
extern const struct fk_table fk_table_avx512 __attribute__((visibility("hidden")));
extern const struct fk_table fk_table_avx512bf16 __attribute__((visibility("hidden")));
extern const struct fk_table fk_table_amx __attribute__((visibility("hidden")));
#ifdef __cplusplus
}
#endif
