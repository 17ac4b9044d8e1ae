// What is looked at before every call of a model: where hundreds of tensors lie and how, and objects of Python. Behind
// a call, which reads all weights, none of that is in a cache: it is fetched ahead.

#include <cstring>

#include "registry.h"

namespace fk {
namespace {

constexpr int64_t kLine = 64;

// Starts to load what lies at an address, which need not be one.
void fetch(const void* at, int lines = 1) {
  for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(at) + i * kLine);
}

const void* word(const void* at, int64_t offset) {
  const void* found;
  std::memcpy(&found, static_cast<const char*>(at) + offset, sizeof found);
  return found;
}

class Places {
 public:
  explicit Places(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const Tensor& t : tensors_) {
      // A handle is a pointer to torch's own object, whose first words point to the storage and other parts of it.
      places_.push_back({t.get(), word(t.get(), 0), t.const_data_ptr(), t.scalar_type(), t.dim(), layouts_.size()});
      layouts_.insert(layouts_.end(), t.sizes().begin(), t.sizes().end());
      layouts_.insert(layouts_.end(), t.strides().begin(), t.strides().end());
    }
  }

  bool unchanged() const {
    return all_of(static_cast<int64_t>(places_.size()), kTask,
                  [&](int64_t first, int64_t last) { return unchanged(first, last); });
  }

 private:
  static constexpr int64_t kTask = 128;
  // How many tensors ahead.
  static constexpr int64_t kAhead = 12;

  struct Place {
    AtenTensorHandle handle;
    const void* object;
    const void* data;
    ScalarType dtype;
    int64_t dim;
    size_t layout;  // where its sizes and strides begin
  };

  bool unchanged(int64_t first, int64_t last) const {
    for (int64_t i = first; i < last + 2 * kAhead; ++i) {
      if (i < last) {
        fetch(places_[i].handle);
        fetch(places_[i].object, 3);
      }
      if (i >= first + kAhead && i < last + kAhead)
        for (int64_t w = 2; w < 7; ++w) fetch(word(places_[i - kAhead].object, w * 8));
      if (i >= first + 2 * kAhead && !unchanged(i - 2 * kAhead)) return false;
    }
    return true;
  }

  bool unchanged(int64_t i) const {
    const Place& p = places_[i];
    const Tensor& t = tensors_[i];
    if (t.const_data_ptr() != p.data || t.scalar_type() != p.dtype || t.dim() != p.dim) return false;
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t* expected = layouts_.data() + p.layout;
    return std::equal(sizes.begin(), sizes.end(), expected) &&
           std::equal(strides.begin(), strides.end(), expected + p.dim);
  }

  std::vector<Tensor> tensors_;
  std::vector<Place> places_;
  std::vector<int64_t> layouts_;  // sizes and strides of each
};

Registry<Places>& all() {
  static Registry<Places>& found = *new Registry<Places>;  // never destroyed: what it holds needs torch
  return found;
}

int64_t note(std::vector<Tensor> tensors) { return all().add(std::make_shared<Places>(std::move(tensors))); }

bool unchanged(int64_t number) { return all().find(number, "places")->unchanged(); }

void forget(int64_t number) { all().forget(number); }

// `tables`: objects that live, whose words at `arrays` and behind that point to more.
void fetch_ahead(Tensor objects, Tensor tables, int64_t arrays) {
  const auto addresses = [](const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.is_contiguous(), "expected addresses");
    return static_cast<const void* const*>(t.const_data_ptr());
  };
  const void* const* table = addresses(tables);
  const void* const* object = addresses(objects);
  for (int64_t i = 0; i < tables.numel(); ++i) fetch(table[i], 2);
  for (int64_t i = 0; i < objects.numel(); ++i) fetch(object[i]);
  for (int64_t i = 0; i < tables.numel(); ++i)
    for (int64_t w = 0; w < 2; ++w) fetch(word(table[i], arrays + 8 * w), 4);
}

}  // namespace
}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CompositeExplicitAutograd, m) {
  m.impl("places_note", TORCH_BOX(&fk::note));
  m.impl("places_unchanged", TORCH_BOX(&fk::unchanged));
  m.impl("places_forget", TORCH_BOX(&fk::forget));
  m.impl("fetch_ahead", TORCH_BOX(&fk::fetch_ahead));
}
