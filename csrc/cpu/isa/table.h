// Included once per instruction set: all kernels, and the table through which they are called.
#pragma once

#include "attention_backward.h"
#include "conv_projection.h"
#include "depthwise_conv.h"
#include "depthwise_mlp.h"
#include "global_attention.h"
#include "head_tokens.h"
#include "linear_backward.h"
#include "local_attention.h"
#include "pack.h"
#include "patch_embedding.h"
#include "patch_embedding_backward.h"
#include "peak.h"
#include "pointwise_mlp.h"
#include "pointwise_mlp_backward.h"
#include "pooled_projection.h"

#define FK_TABLE(isa)                                 \
  extern "C" const struct fk_table fk_table_##isa = { \
      #isa,                                           \
      FK_VL,                                          \
      kPanel,                                         \
      kTileRows,                                      \
      FK_NATIVE_BF16,                                 \
      scratch_conv_projection,                        \
      conv_projection,                                \
      scratch_global_attention,                       \
      global_attention,                               \
      scratch_pointwise_mlp,                          \
      pointwise_mlp,                                  \
      scratch_patch_embedding,                        \
      patch_embedding,                                \
      scratch_normalize_tokens,                       \
      normalize_tokens,                               \
      scratch_head_tokens,                            \
      head_tokens,                                    \
      pool,                                           \
      scratch_pooled_projection,                      \
      pooled_projection,                              \
      scratch_local_attention,                        \
      local_attention,                                \
      scratch_depthwise_conv,                         \
      depthwise_conv,                                 \
      scratch_depthwise_mlp,                          \
      depthwise_mlp,                                  \
      depthwise_mlp_sum,                              \
      group_norm_rows,                                \
      moments,                                        \
      add_partials,                                   \
      scratch_pointwise_mlp_backward,                 \
      pointwise_mlp_backward,                         \
      pointwise_mlp_backward_input,                   \
      scratch_patch_embedding_backward,               \
      patch_embedding_backward,                       \
      scratch_patch_embedding_input,                  \
      patch_embedding_input,                          \
      scratch_linear_backward,                        \
      linear_backward,                                \
      scratch_linear_forward,                         \
      linear_forward,                                 \
      scratch_attention_backward,                     \
      attention_backward,                             \
      pack_panel,                                     \
      peak,                                           \
  };
