// Weights in the kernels' layout, in one block of bytes that can be kept from call to call.
//
// A block starts with a fingerprint of what it was made for: instruction set, compute type, shapes, and samples of the
// weights. A block whose fingerprint differs is not used: the weights are then packed for this call alone.
#pragma once

#include <functional>

#include "pages.h"
#include "plan.h"

namespace fk {

float element(const fk_array& array, int64_t index);

// Batch normalisation by running statistics: y = scale x + shift per channel.
struct BatchNorm {
  fk_array weight, bias, mean, var;
  double eps;

  bool present() const { return mean.data != nullptr; }
  double scale(int64_t c) const;
  double shift(int64_t c) const;
};

// The one whose weight, bias, mean and variance begin at `first`; absent where none of them is there.
BatchNorm batch_norm(const TensorList& tensors, size_t first, int64_t channels, double eps);

// Channels of a depthwise filter are padded to whole vectors.
int64_t padded_channels(int64_t channels);

// A depthwise convolution as the kernels read it.
struct Filter {
  const float* taps;   // [taps][padded]
  const float* shift;  // [padded]
};

// Scale and shift of each channel; null: none.
struct Affine {
  const float *scale, *shift;
};

// Lays the weights of one operator out behind each other. An operator describes its weights twice, first to measure
// (null base), then to get pointers and, where the block is new, the list of what is to be filled in.
class Packer {
 public:
  // `splits`: fp32 weights are split into parts as well, where products are made of those. That saves doing so in every
  // product, and takes two and a half times the memory.
  Packer(char* base, bool fills, bool splits) : base_(base), fills_(fills), splits_(splits) {}

  fk_linear linear(const fk_array& weight, const fk_array& bias, int64_t n, int64_t k, bool low_precision,
                   int64_t taps = 1);
  // The product with the weight's transpose, for gradients: weight is [k, n, step], of which the first of each `step`
  // values counts.
  fk_linear transposed(const fk_array& weight, int64_t n, int64_t k, bool low_precision, int64_t step = 1);
  // The same with batch norms folded in: `in` on its inputs, `out` on its results, each maybe absent. That is exact in
  // exact arithmetic: no zero padding may lie between a norm and what it is folded into.
  fk_linear folded(const fk_array& weight, const fk_array& bias, int64_t n, int64_t k, bool low_precision,
                   const BatchNorm& in, const BatchNorm& out, int64_t taps = 1);
  // A norm that nothing can take in, and a scale and shift behind it, each maybe absent.
  Affine affine(const BatchNorm& norm, int64_t n, int64_t padded, const fk_array& scale = absent(),
                const fk_array& shift = absent());
  // `n` values converted to fp32; `fill` where the source is absent, and up to `padded`.
  const float* vector(const fk_array& source, int64_t n, int64_t padded, float fill);

  // A bias table [heads, queries, keys] transposed to [heads][keys][stride], in units of log2, zeros behind the
  // queries.
  const float* table(const fk_array& source, int64_t heads, int64_t queries, int64_t keys, int64_t stride);

  // A depthwise filter [n, 1, k, k] and its bias, with the norm behind it folded in. `adds_input`: in front of the norm
  // its input is added to its result, which is one more weight on the centre.
  Filter depthwise(const fk_array& filter, const fk_array& bias, const BatchNorm& norm, int64_t n, int64_t taps,
                   int64_t padded, bool adds_input = false);

  int64_t bytes() const { return used_; }
  void fill();

 private:
  fk_linear add(fk_pack_linear linear);
  char* take(int64_t bytes);
  char* base_;
  bool fills_, splits_;
  int64_t used_ = 64;

  struct Vector {
    fk_array source;
    int64_t n, padded;
    float fill;
    float* to;
  };
  struct Table {
    fk_array source;
    int64_t heads, queries, keys, stride;
    float* to;
  };
  struct Depthwise {
    fk_array filter, bias;
    BatchNorm norm;
    int64_t n, taps, padded;
    bool adds_input;
    float *to, *shift;
  };
  struct Fold {
    fk_array weight, bias;
    int64_t n, k;
    BatchNorm in, out;
    std::vector<float> values, shifts;
  };
  struct Norm {
    BatchNorm norm;
    fk_array outer_scale, outer_shift;
    int64_t n, padded;
    float *scale, *shift;
  };
  static void fill_norm(const Norm& m);
  static void fill_filter(const Depthwise& d);
  static void fold(Fold* f);

  std::vector<Fold> folds_;
  std::vector<Norm> norms_;

  std::vector<Depthwise> filters_;
  std::vector<Table> tables_;
  std::vector<fk_pack_linear> linears_;
  std::vector<Vector> vectors_;
};

// The fingerprint of the weights `tensors[first..last)`: 32 bits from each of a few elements, mixed with `key`. Unless
// `packed` carries it, the weights are about to be read: those in other layouts are replaced by row-major copies.
// `look` checks the weights and takes their views: before anything of them is read, and again behind such a copy.
uint64_t identify(std::initializer_list<int64_t> key, TensorList& tensors, size_t first, size_t last,
                  const std::optional<Tensor>& packed, const std::function<void()>& look);

bool carries(const std::optional<Tensor>& packed, uint64_t fingerprint);
void stamp(char* block, uint64_t fingerprint);

// The block for this call: `packed` when it fits, else a new one. `describe(packer)` lays out the weights and keeps the
// pointers it gets; those of its last run are valid while the block lives.
template <class Describe>
Tensor pack(const std::optional<Tensor>& packed, uint64_t mark, const Describe& describe, bool splits = false) {
  Packer measure(nullptr, false, splits);
  describe(measure);
  const bool reuse = carries(packed, mark);
  STD_TORCH_CHECK(!reuse || packed->numel() == measure.bytes(),
                  "packed: damaged, its size does not go with its weights");
  Tensor block = reuse ? *packed : empty({measure.bytes()}, ScalarType::Byte);
  char* base = static_cast<char*>(block.mutable_data_ptr());
  Packer packer(base, !reuse, splits);
  describe(packer);
  if (!reuse) {
    prefer_large_pages(base, measure.bytes());
    packer.fill();
    stamp(base, mark);
  }
  return block;
}

// The block of an operator's call, or to be `kept` for many. Weights that are packed for one call alone are split, as
// each task would have to do otherwise; those that are kept take less memory as they are.
template <class Describe>
Tensor pack_call(const std::optional<Tensor>& packed, uint64_t mark, const Describe& describe, bool kept) {
  return pack(packed, mark, describe, !kept && !packed.has_value());
}

// The block for this call alone, as a backward has it: its weights change from call to call.
template <class Describe>
Tensor pack_once(const Describe& describe) {
  return pack(std::nullopt, 0, describe, true);
}

// The norm in front of an operator; absent affine parameters become ones and zeros.
fk_norm norm_of(Packer& packer, fk_norm_kind kind, const fk_array& weight, const fk_array& bias, double eps,
                int64_t channels);
fk_norm norm_of(Packer& packer, const fk_array& weight, const fk_array& bias, std::optional<double> eps,
                int64_t channels);

}  // namespace fk
