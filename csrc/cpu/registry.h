// Objects that Python knows by a number.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "support.h"

namespace fk {

template <class T>
class Registry {
 public:
  int64_t add(std::shared_ptr<T> object) {
    const std::lock_guard<std::mutex> lock(mutex_);
    objects_[++latest_] = std::move(object);
    return latest_;
  }

  std::shared_ptr<T> find(int64_t number, const char* what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = objects_.find(number);
    STD_TORCH_CHECK(at != objects_.end(), what, ": no such ", what);
    return at->second;
  }

  void forget(int64_t number) {
    std::shared_ptr<T> object;  // destroyed behind the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = objects_.find(number);
    if (at == objects_.end()) return;
    object = std::move(at->second);
    objects_.erase(at);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<T>> objects_;
  int64_t latest_ = 0;
};

}  // namespace fk
