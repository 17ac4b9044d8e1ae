// The backward of depthwise convolutions with batch norms behind them, as conv_projection and depthwise_conv put it to
// use: its bands, sums and maps.
#pragma once

#include "channel_norm.h"
#include "gradients.h"

namespace fk {

// Rows of a band: up to `most`, yet enough bands for all threads, as far as the shape alone can say.
int64_t band_rows(int64_t batch, int64_t height, int64_t most);

// Sums over all pixels, of each branch [kinds][channels].
class ConvSums {
 public:
  // Sets kinds, partial sums and their memory; geometry and filters of all branches must be there.
  ConvSums(fk_conv_projection_backward* to, Memory* memory);

  // Added over the partial sums, in order.
  std::vector<double> of(int branch, int64_t kind) const;
  // The gradient of a branch's filter [channels, 1, kernel, kernel].
  std::vector<double> of_filter(int branch) const;
  // The steps up to the convolutions' results: the sums of batch norms, or everything.
  void run(bool finish) const;

 private:
  const fk_conv_projection_backward& p_;
  int64_t channels_, padded_;
};

// Where the gradients of a branch's results go, in a border of zeros.
Tensor bordered_map(fk_conv_projection_backward* to, int branch);

// The gradients of a batch norm behind a convolution, from the sums of the gradient behind it, alone and times the
// normalised value. `first`: position of its weight, in front of bias, mean and variance.
void batch_norm_gradients(const BatchNorm& bn, bool of_batch, const std::vector<double>& alone,
                          const std::vector<double>& times, size_t first, Gradients* found);

// The last step: the gradients of the map, and of the norm in front of the convolutions.
void map_gradients(fk_conv_projection_backward* p, size_t x, size_t norm_weight, size_t norm_bias, Gradients* found);

}  // namespace fk
