// What the kernels' plans say of a call, for the tests.
#include "params.h"

namespace {

fk::Linear linear(int64_t out, int64_t in) {
  return {nullptr, {nullptr, fk::kF32}, static_cast<int32_t>(out), static_cast<int32_t>(in)};
}

}  // namespace

// Of a call, in bf16 or fp32, on a GPU with these bytes of shared memory for a block and so many multiprocessors: into
// `to` the number of sets, the shared memory of a block, and of each set its branches, blocks of a sample, bytes that a
// block reads, and rows that it multiplies.
extern "C" __attribute__((visibility("default"))) void fk_projection_plan(int64_t batch, int64_t height, int64_t width,
                                                                          int64_t channels, int64_t prefix,
                                                                          int64_t fp32, int64_t shared,
                                                                          int64_t processors, int64_t* to) {
  fk::ConvProjection p = {};
  p.dtype = fp32 ? fk::kF32 : fk::kBF16;
  p.norm.kind = fk::kLayerNorm;
  p.batch = static_cast<int32_t>(batch);
  p.height = static_cast<int32_t>(height);
  p.width = static_cast<int32_t>(width);
  p.channels = static_cast<int32_t>(channels);
  p.prefix = static_cast<int32_t>(prefix);
  for (int i = 0; i < 3; ++i) {
    fk::ProjectionBranch& b = p.branches[i];
    b.linear = linear(channels, channels);
    b.kernel = 3;
    b.stride = i ? 2 : 1;
    b.padding = 1;
    b.out_height = (p.height - 1) / b.stride + 1;
    b.out_width = (p.width - 1) / b.stride + 1;
  }
  fk::choose_sets(p, shared, processors);
  *to++ = p.sets;
  *to++ = fk::shared_bytes(p);
  for (int s = 0; s < p.sets; ++s) {
    const fk::ProjectionSet& set = p.set[s];
    *to++ = set.count;
    *to++ = int64_t{set.down} * set.across;
    *to++ = fk::read_bytes(p, set);
    int64_t rows = 0;
    for (int i = set.first; i < set.first + set.count; ++i) rows += fk::projected_rows(p.branches[i]);
    *to++ = rows;
  }
}

// As above; blocks of a sample, the shared memory of a block, and bytes that it reads.
extern "C" __attribute__((visibility("default"))) void fk_mlp_plan(int64_t height, int64_t width, int64_t channels,
                                                                   int64_t hidden, int64_t kernel, int64_t fp32,
                                                                   int64_t shared, int64_t* to) {
  fk::DepthwiseMlp p = {};
  p.dtype = fp32 ? fk::kF32 : fk::kBF16;
  p.norm.kind = fk::kLayerNorm;
  p.height = static_cast<int32_t>(height);
  p.width = static_cast<int32_t>(width);
  p.kernel = static_cast<int32_t>(kernel);
  p.expand = linear(hidden, channels);
  p.project = linear(channels, hidden);
  fk::choose_tile(p, shared);
  to[0] = fk::blocks_per_sample(p);
  to[1] = fk::shared_bytes(p);
  to[2] = fk::read_bytes(p);
}
