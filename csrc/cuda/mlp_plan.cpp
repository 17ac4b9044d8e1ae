// How a depthwise MLP is divided among blocks. No torch, no CUDA.
#include <algorithm>

#include "params.h"

namespace fk {
namespace {

int32_t parts(int32_t size, int32_t part) { return (size + part - 1) / part; }
// A side of a block's results: as few blocks as there must be, and these about equal.
int32_t side(int32_t size, int32_t most) { return parts(size, parts(size, most)); }

// Of a tile's patch, what lies on the map at most.
int64_t on_map(int32_t size, int32_t tile, int32_t kernel) {
  return std::min(size, tile + std::min((size - 1) / tile, 2) * (kernel / 2));
}

}  // namespace

void choose_tile(DepthwiseMlp& p, int64_t most) {
  p.columns = side(p.project.out, most_columns(p.dtype));
  p.slices = parts(p.project.out, p.columns);
  for (int32_t wanted = kMostSide; wanted > 0; --wanted) {
    p.tile_height = side(p.height, wanted);
    p.tile_width = side(p.width, wanted);
    p.down = parts(p.height, p.tile_height);
    p.across = parts(p.width, p.tile_width);
    const int32_t border = p.kernel - 1;
    if ((p.tile_height + border) * (p.tile_width + border) <= kPatchRows && shared_bytes(p) <= most) return;
  }
}

int64_t read_bytes(const DepthwiseMlp& p) {
  const int64_t pixels = on_map(p.height, p.tile_height, p.kernel) * on_map(p.width, p.tile_width, p.kernel);
  return ((pixels + p.expand.out) * p.expand.in + int64_t{p.columns} * p.project.in) * size_of(p.dtype);
}

}  // namespace fk
