// Vector clocks: how much is known of what each thread did. See happens_before.h.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace sparseops_emulation::memory {

// By thread and unit of the running blocks; those past the end are at time 0, which is never. Copies share their times
// until one of them changes.
class Clock {
 public:
  std::uint32_t operator[](std::size_t i) const { return times_ && i < times_->size() ? (*times_)[i] : 0; }
  bool is_same(const Clock& other) const { return times_ == other.times_; }

  void join(const Clock& other) {
    if (!other.times_ || is_same(other)) return;
    if (!times_) {
      times_ = other.times_;
      return;
    }
    own(other.times_->size());
    for (std::size_t i = 0; i < other.times_->size(); ++i) (*times_)[i] = std::max((*times_)[i], (*other.times_)[i]);
  }

  void set(std::size_t i, std::uint32_t time) {
    own(i + 1);
    (*times_)[i] = time;
  }

 private:
  using Times = std::vector<std::uint32_t>;

  void own(std::size_t size) {
    if (!times_)
      times_ = std::make_shared<Times>();
    else if (times_.use_count() > 1)
      times_ = std::make_shared<Times>(*times_);
    if (times_->size() < size) times_->resize(size);
  }

  std::shared_ptr<Times> times_;
};

// What is known of blocks that ran before. Shared by all who know the same, and never changed.
using Elsewhere = std::shared_ptr<const std::map<std::uint32_t, Clock>>;

// What those who added to it did and know, for whoever acquires it.
struct SyncClock {
  Clock seen;         // by way of barriers
  Clock seen_fenced;  // and of fence_proxy_async too
  Clock joined_last;  // to `seen`: many who know the same add to one clock
  Elsewhere elsewhere;
};

}  // namespace sparseops_emulation::memory
