// What batch norms behind depthwise convolutions meet in a batch.
#pragma once

#include "support.h"

namespace fk {

// Mean and biased variance of each channel of each branch; zeros where a branch has no results.
struct ConvMoments {
  std::vector<double> mean[3], variance[3];
};
// Of convolutions whose geometry, bands and filters are described: per band around the band's own mean, merged in band
// order. The bands must not depend on the number of threads.
ConvMoments conv_moments(fk_conv_projection* c);

}  // namespace fk
