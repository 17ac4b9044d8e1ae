// Where tensors lie and how: that of hundreds is looked at before every call of a model.

#include "registry.h"

namespace fk {
namespace {

struct Place {
  Tensor tensor;
  const void* data;
  ScalarType dtype;
  std::vector<int64_t> sizes, strides;

  explicit Place(const Tensor& t)
      : tensor(t),
        data(t.const_data_ptr()),
        dtype(t.scalar_type()),
        sizes(t.sizes().begin(), t.sizes().end()),
        strides(t.strides().begin(), t.strides().end()) {}

  bool unchanged() const {
    const auto now = tensor.sizes(), steps = tensor.strides();
    return tensor.const_data_ptr() == data && tensor.scalar_type() == dtype &&
           std::equal(sizes.begin(), sizes.end(), now.begin(), now.end()) &&
           std::equal(strides.begin(), strides.end(), steps.begin(), steps.end());
  }
};

using Places = std::vector<Place>;

Registry<Places>& all() {
  static Registry<Places>& found = *new Registry<Places>;  // never destroyed: what it holds needs torch
  return found;
}

int64_t note(std::vector<Tensor> tensors) {
  return all().add(std::make_shared<Places>(tensors.begin(), tensors.end()));
}

bool unchanged(int64_t number) {
  const std::shared_ptr<Places> places = all().find(number, "places");
  return std::all_of(places->begin(), places->end(), [](const Place& p) { return p.unchanged(); });
}

void forget(int64_t number) { all().forget(number); }

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CompositeExplicitAutograd, m) {
  m.impl("places_note", TORCH_BOX(&fk::note));
  m.impl("places_unchanged", TORCH_BOX(&fk::unchanged));
  m.impl("places_forget", TORCH_BOX(&fk::forget));
}
