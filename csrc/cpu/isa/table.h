// Included once per instruction set: all kernels, and the table through which they are called.
#pragma once

#include "attention_backward.h"
#include "batch_norm_act.h"
#include "class_token.h"
#include "conv_projection_backward.h"
#include "depthwise_conv.h"
#include "depthwise_mlp_backward.h"
#include "depthwise_mlp_statistics.h"
#include "global_attention.h"
#include "head_tokens_backward.h"
#include "linear_backward.h"
#include "local_attention.h"
#include "merge_head_tokens.h"
#include "norm_backward.h"
#include "pack.h"
#include "patch_embedding.h"
#include "patch_embedding_backward.h"
#include "peak.h"
#include "pointwise_mlp.h"
#include "pointwise_mlp_backward.h"
#include "pooled_projection.h"

#if FK_AMX
namespace {

// A task, with the tile registers.
template <class Task, Task task>
struct AmxTask;
template <class... Args, void (*task)(Args...)>
struct AmxTask<void (*)(Args...), task> {
  static void run(Args... args) {
    amx_acquire();
    task(args...);
    amx_release();
  }
};

}  // namespace
#define FK_TASK(task) AmxTask<decltype(fk_table::task), task>::run
#else
#define FK_TASK(task) task
#endif

#define FK_TABLE(isa)                                 \
  extern "C" const struct fk_table fk_table_##isa = { \
      #isa,                                           \
      FK_VL,                                          \
      kPanel,                                         \
      FK_NATIVE_BF16,                                 \
      scratch_conv_projection,                        \
      FK_TASK(conv_projection),                       \
      FK_TASK(conv_projection_backward),              \
      scratch_conv_projection_input,                  \
      FK_TASK(conv_projection_input),                 \
      scratch_global_attention,                       \
      FK_TASK(global_attention),                      \
      scratch_pointwise_mlp,                          \
      FK_TASK(pointwise_mlp),                         \
      scratch_patch_embedding,                        \
      FK_TASK(patch_embedding),                       \
      scratch_normalize_tokens,                       \
      FK_TASK(normalize_tokens),                      \
      scratch_head_tokens,                            \
      FK_TASK(head_tokens),                           \
      FK_TASK(merge_head_tokens),                     \
      scratch_gate_class_token,                       \
      FK_TASK(gate_class_token),                      \
      FK_TASK(head_tokens_slopes),                    \
      scratch_head_tokens_backward,                   \
      FK_TASK(head_tokens_backward),                  \
      FK_TASK(pool),                                  \
      FK_TASK(pool_backward),                         \
      scratch_pooled_projection,                      \
      FK_TASK(pooled_projection),                     \
      scratch_local_attention,                        \
      FK_TASK(local_attention),                       \
      scratch_depthwise_conv,                         \
      FK_TASK(depthwise_conv),                        \
      scratch_depthwise_mlp,                          \
      FK_TASK(depthwise_mlp),                         \
      FK_TASK(depthwise_mlp_sum),                     \
      FK_TASK(group_norm_rows),                       \
      FK_TASK(moments),                               \
      FK_TASK(add_partials),                          \
      FK_TASK(add_weight_sums),                       \
      scratch_pointwise_mlp_backward,                 \
      FK_TASK(pointwise_mlp_backward),                \
      FK_TASK(pointwise_mlp_backward_input),          \
      scratch_patch_embedding_backward,               \
      FK_TASK(patch_embedding_backward),              \
      scratch_patch_embedding_input,                  \
      FK_TASK(patch_embedding_input),                 \
      scratch_linear_backward,                        \
      FK_TASK(linear_backward),                       \
      scratch_linear_forward,                         \
      FK_TASK(linear_forward),                        \
      scratch_attention_backward,                     \
      FK_TASK(attention_backward),                    \
      FK_TASK(pack_panel),                            \
      weight_part_bytes,                              \
      FK_TASK(norm_backward_totals),                  \
      FK_TASK(norm_backward),                         \
      FK_TASK(statistics_backward),                   \
      store_depthwise_mlp_backward,                   \
      chunk_maps_depthwise_mlp_backward,              \
      scratch_depthwise_mlp_backward,                 \
      FK_TASK(depthwise_mlp_backward),                \
      store_depthwise_mlp_statistics,                 \
      scratch_depthwise_mlp_statistics,               \
      FK_TASK(depthwise_mlp_statistics),              \
      FK_TASK(batch_norm_rows),                       \
      FK_TASK(channel_moments),                       \
      FK_TASK(batch_norm_backward),                   \
      scratch_batch_norm_act,                         \
      FK_TASK(batch_norm_act),                        \
      FK_TASK(depthwise_mlp_backward_step),           \
      peak,                                           \
  };
