#include "plan.h"

#include "registry.h"

namespace fk {
namespace {

constexpr int64_t kAlignment = 64;
// Of what lies between the calls of a plan, which has a place in memory that the thread keeps.
constexpr int64_t kMostBytes = int64_t{64} << 20;

// Where a call keeps the address of something that lies `offset` bytes behind the start of a region.
struct Pointer {
  void* location;
  int64_t offset;

  void set(const char* region) const {
    const char* address = region + offset;
    std::memcpy(location, &address, sizeof address);
  }
};

// A tensor that comes from outside or is handed out: what it must look like, and who reads or writes it.
struct Boundary {
  std::vector<int64_t> sizes, strides;
  ScalarType dtype;
  std::vector<Pointer> pointers;

  explicit Boundary(const Tensor& t)
      : sizes(t.sizes().begin(), t.sizes().end()),
        strides(t.strides().begin(), t.strides().end()),
        dtype(t.scalar_type()) {}

  bool describes(const Tensor& t) const {
    const auto found = t.sizes(), steps = t.strides();
    return t.is_cpu() && t.scalar_type() == dtype &&
           std::equal(sizes.begin(), sizes.end(), found.begin(), found.end()) &&
           std::equal(strides.begin(), strides.end(), steps.begin(), steps.end());
  }
};

// The weights of all calls, where they lay and what samples of them were.
class Weights {
 public:
  void add(const std::vector<Tensor>& weights, const std::vector<Sample>& samples) {
    for (const Tensor& t : weights) places_.push_back({t, t.const_data_ptr()});
    samples_.insert(samples_.end(), samples.begin(), samples.end());
  }

  // They are read in the order of their addresses, which memory likes best.
  void sort() {
    std::sort(samples_.begin(), samples_.end(), [](const Sample& a, const Sample& b) { return a.address < b.address; });
  }

  bool unchanged() const {
    // Only those that still lie there may be read.
    for (const Place& p : places_)
      if (p.weight.const_data_ptr() != p.data) return false;
    const int64_t n = static_cast<int64_t>(samples_.size());
    return all_of(n, kTask, [&](int64_t first, int64_t last) {
      uint32_t different = 0;
      for (int64_t i = first; i < last; ++i) {
        if (i + kAhead < n) __builtin_prefetch(samples_[i + kAhead].address);
        different |= samples_[i].now() ^ samples_[i].bits;
      }
      return different == 0;
    });
  }

 private:
  static constexpr int64_t kTask = 1024;
  // How many samples ahead.
  static constexpr int64_t kAhead = 32;

  struct Place {
    Tensor weight;
    const void* data;
  };
  std::vector<Place> places_;
  std::vector<Sample> samples_;
};

struct Plan {
  std::mutex busy;
  std::vector<Boundary> inputs, outputs;
  Weights weights;
  std::vector<std::function<void()>> calls;
  // What lies between the calls: all pointers to it, for now to offsets from `memory`, which has this many bytes.
  std::vector<Pointer> between;
  int64_t bytes = 0;
  const char* memory = nullptr;
};

// Memory of an input or a result while a plan is recorded.
struct Region {
  const char* begin;
  int64_t bytes;
  size_t first = 0, last = 0;  // calls that use it
  std::vector<Pointer> pointers = {};
  int64_t place = -1;  // in the memory of the plan
};

class Recorder {
 public:
  bool usable = true;
  Weights weights;

  void add(std::function<void()> run, std::initializer_list<void*> pointers, std::vector<Tensor> results) {
    for (void* location : pointers) {
      const char* address;
      std::memcpy(&address, location, sizeof address);
      if (address) pointers_.push_back({calls_.size(), location, address});
    }
    calls_.push_back(std::move(run));
    for (Tensor& t : results) results_.push_back(std::move(t));
  }

  std::shared_ptr<Plan> finish(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
    std::vector<Region> regions;
    for (const Tensor& t : inputs) regions.push_back(region_of(t));
    for (const Tensor& t : results_) regions.push_back(region_of(t));
    if (!usable || calls_.empty() || overlap(regions) || !resolve(&regions)) return nullptr;

    auto plan = std::make_shared<Plan>();
    for (size_t i = 0; i < inputs.size(); ++i) {
      plan->inputs.emplace_back(inputs[i]);
      plan->inputs.back().pointers = regions[i].pointers;
    }
    std::vector<Region*> between;
    for (size_t i = inputs.size(); i < regions.size(); ++i) between.push_back(&regions[i]);
    for (const Tensor& t : outputs) {
      const auto at = std::find_if(between.begin(), between.end(), [&](const Region* r) {
        return r->begin == t.const_data_ptr() && r->bytes == extent(t);
      });
      if (at == between.end() || !t.is_contiguous() || t.numel() == 0) return nullptr;
      plan->outputs.emplace_back(t);
      plan->outputs.back().pointers = (*at)->pointers;
      between.erase(at);
    }
    plan->bytes = place(between);
    if (plan->bytes > kMostBytes) return nullptr;
    for (const Region* region : between)
      for (const Pointer& pointer : region->pointers)
        plan->between.push_back({pointer.location, region->place + pointer.offset});
    plan->weights = std::move(weights);
    plan->weights.sort();
    plan->calls = std::move(calls_);
    return plan;
  }

 private:
  struct Use {
    size_t call;
    void* location;
    const char* address;
  };

  // Bytes from the first to the last element; strides are never negative.
  static int64_t extent(const Tensor& t) {
    if (t.numel() == 0) return 0;
    int64_t last = 0;
    for (int64_t axis = 0; axis < t.dim(); ++axis) last += (t.size(axis) - 1) * t.stride(axis);
    return (last + 1) * static_cast<int64_t>(t.element_size());
  }

  static Region region_of(const Tensor& t) { return {static_cast<const char*>(t.const_data_ptr()), extent(t)}; }

  // Inputs that share memory now need not do so later.
  static bool overlap(std::vector<Region> regions) {
    std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < regions.size(); ++i)
      if (regions[i - 1].bytes > 0 && regions[i].bytes > 0 &&
          regions[i - 1].begin + regions[i - 1].bytes > regions[i].begin)
        return true;
    return false;
  }

  // An address in none of the regions belongs to a copy that a call made for itself.
  bool resolve(std::vector<Region>* regions) const {
    for (const Use& use : pointers_) {
      const auto at = std::find_if(regions->begin(), regions->end(), [&](const Region& r) {
        return use.address >= r.begin && use.address < r.begin + r.bytes;
      });
      if (at == regions->end()) return false;
      if (at->pointers.empty()) at->first = use.call;
      at->last = use.call;
      at->pointers.push_back({use.location, use.address - at->begin});
    }
    return true;
  }

  // Places for what is never used at the same time may overlap. Returns the bytes that all of them take.
  static int64_t place(const std::vector<Region*>& regions) {
    int64_t end = 0;
    for (Region* region : regions) {
      int64_t at = 0;
      for (bool moved = true; moved;) {
        moved = false;
        for (const Region* other : regions) {
          const bool together = other->place >= 0 && other->first <= region->last && region->first <= other->last;
          if (together && at < other->place + other->bytes && other->place < at + region->bytes) {
            at = (other->place + other->bytes + kAlignment - 1) / kAlignment * kAlignment;
            moved = true;
          }
        }
      }
      region->place = at;
      end = std::max(end, at + region->bytes);
    }
    return end;
  }

  std::vector<std::function<void()>> calls_;
  std::vector<Use> pointers_;
  std::vector<Tensor> results_;
};

thread_local std::unique_ptr<Recorder> recorder;

Registry<Plan>& plans() {
  static Registry<Plan>& all = *new Registry<Plan>;  // never destroyed: what it holds needs torch
  return all;
}

void begin() { recorder = std::make_unique<Recorder>(); }

// The number of the plan of what this thread has called since `plan_begin`, 0 where none can be made.
int64_t end(std::vector<Tensor> inputs, std::vector<Tensor> outputs) {
  STD_TORCH_CHECK(recorder, "plan_end: expected plan_begin before it");
  const std::unique_ptr<Recorder> finished = std::move(recorder);
  std::shared_ptr<Plan> plan = outputs.empty() ? nullptr : finished->finish(inputs, outputs);
  return plan ? plans().add(std::move(plan)) : 0;
}

void forget(int64_t number) { plans().forget(number); }

// The plan's results for other inputs; nothing where another thread runs it just now or a weight has changed.
std::vector<Tensor> replay(std::vector<Tensor> inputs, int64_t number) {
  const std::shared_ptr<Plan> plan = plans().find(number, "plan");
  const std::unique_lock<std::mutex> lock(plan->busy, std::try_to_lock);
  if (!lock) return {};
  STD_TORCH_CHECK(inputs.size() == plan->inputs.size(), "inputs: expected ", plan->inputs.size(), ", got ",
                  inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i)
    STD_TORCH_CHECK(plan->inputs[i].describes(inputs[i]), "inputs: entry ", i, " is not laid out like the plan's");
  if (!plan->weights.unchanged()) return {};
  for (size_t i = 0; i < inputs.size(); ++i) {
    const char* data = static_cast<const char*>(inputs[i].const_data_ptr());
    STD_TORCH_CHECK(data || inputs[i].numel() == 0, "inputs: the memory of entry ", i, " has been freed");
    for (const Pointer& pointer : plan->inputs[i].pointers) pointer.set(data);
  }
  std::vector<Tensor> outputs;
  for (const Boundary& output : plan->outputs) {
    outputs.push_back(empty(output.sizes, output.dtype));
    for (const Pointer& pointer : output.pointers)
      pointer.set(static_cast<const char*>(outputs.back().mutable_data_ptr()));
  }
  static thread_local Arena arena;
  const char* memory = static_cast<const char*>(arena.at_least(plan->bytes));
  if (memory != plan->memory)
    for (const Pointer& pointer : plan->between) pointer.set(memory);
  plan->memory = memory;
  for (const auto& call : plan->calls) call();
  return outputs;
}

}  // namespace

bool recording() { return recorder != nullptr; }

void record_weights(const std::vector<Tensor>& weights, const std::vector<Sample>& samples) {
  recorder->weights.add(weights, samples);
}

void give_up_recording() { recorder->usable = false; }

void record_call(std::function<void()> run, std::initializer_list<void*> pointers, std::vector<Tensor> results) {
  recorder->add(std::move(run), pointers, std::move(results));
}

}  // namespace fk

STABLE_TORCH_LIBRARY_IMPL(fastvit, CompositeExplicitAutograd, m) {
  m.impl("plan_begin", TORCH_BOX(&fk::begin));
  m.impl("plan_end", TORCH_BOX(&fk::end));
  m.impl("plan_replay", TORCH_BOX(&fk::replay));
  m.impl("plan_forget", TORCH_BOX(&fk::forget));
}
