// What the race check knows of each byte of shared memory.
#pragma once
#include <array>
#include <memory>
#include <vector>

#include "global_memory.h"

namespace sparseops_emulation::memory {

class SharedByte {
 public:
  Epoch write;
  Epoch copy;              // a copy on its way here
  bool is_object = false;  // of an mbarrier

  // Reads that happened before a later read need not be kept: whoever is ordered after that one is after them too. A
  // task hands on nothing of what it knows, so behind its reads all others are kept.
  template <class Ordered>
  void add_read(const Epoch& read, Ordered ordered) {
    const auto is_behind = [&](const Epoch& e) { return e.thread == read.thread || (!read.by_task && ordered(e)); };
    if (read_.clock == 0 || is_behind(read_)) {
      read_ = read;
      return;
    }
    if (!more_) more_ = std::make_unique<std::vector<Epoch>>();
    std::erase_if(*more_, is_behind);
    more_->push_back(read);
  }

  template <class F>
  void take_reads(F f) {
    f(read_);
    read_ = {};
    if (!more_) return;
    for (const Epoch& read : *more_) f(read);
    more_->clear();
  }

  SharedByte() = default;
  SharedByte(SharedByte&&) = default;
  SharedByte& operator=(const SharedByte& from) {
    write = from.write;
    copy = from.copy;
    is_object = from.is_object;
    read_ = from.read_;
    if (from.more_ && !from.more_->empty()) {
      if (!more_) more_ = std::make_unique<std::vector<Epoch>>();
      *more_ = *from.more_;
    } else if (more_) {
      more_->clear();
    }
    return *this;
  }

 private:
  Epoch read_;
  std::unique_ptr<std::vector<Epoch>> more_;  // where several threads read and none is ordered before the last
};

// The bytes of dynamic shared memory of all running blocks, then those of __shared__ variables. Kept from block to
// block; what is of an earlier one counts as nothing. 16 bytes that are always accessed together, as copies and tensor
// cores do, are kept as one.
class SharedShadow {
 public:
  static constexpr std::size_t kChunk = 16;

  void begin_blocks(const SharedMemory& shared) {
    ++generation_;
    regions_.clear();
    std::size_t chunks = 0;
    const auto add = [&](const Range& range, unsigned rank, bool is_variables) {
      if (range.begin == range.end) return;
      const auto first = reinterpret_cast<std::uintptr_t>(range.begin) / kChunk;
      regions_.push_back({range, first, chunks, rank, is_variables});
      chunks += reinterpret_cast<std::uintptr_t>(range.end - 1) / kChunk - first + 1;
    };
    for (unsigned rank = 0; rank < shared.dynamic.size(); ++rank) add(shared.dynamic[rank], rank, false);
    add(shared.variables, 0, true);
    if (chunks_.size() < chunks) chunks_.resize(chunks);
  }

  struct Region {
    Range range;
    std::uintptr_t first;  // chunk of memory
    std::size_t index;     // of its shadow
    unsigned rank;
    bool is_variables;
  };

  const Region* find(const void* address, std::size_t bytes) const {
    for (const Region& region : regions_)
      if (region.range.holds(address, bytes)) return &region;
    return nullptr;
  }

  // Calls f(byte, offset) for what there is of [address, address + bytes): bytes, or chunks where whole ones are
  // wanted and kept. `makes_alike` if f leaves the bytes of a chunk alike.
  template <class F>
  void for_each(const Region& region, const void* address, std::size_t bytes, bool makes_alike, F f) {
    const auto begin = reinterpret_cast<std::uintptr_t>(address), end = begin + bytes;
    const auto base = reinterpret_cast<std::uintptr_t>(region.range.begin);
    for (std::uintptr_t at = begin; at < end;) {
      Chunk& chunk = chunks_[region.index + (at / kChunk - region.first)];
      if (chunk.generation != generation_) {
        chunk.generation = generation_;
        chunk.is_split = false;
        chunk.whole = SharedByte();
      }
      const std::uintptr_t stop = std::min(end, (at / kChunk + 1) * kChunk);
      if (stop - at == kChunk) {
        if (!chunk.is_split) {
          f(chunk.whole, std::ptrdiff_t(at - base));
          at = stop;
          continue;
        }
      } else if (!chunk.is_split) {
        split(chunk);
      }
      const bool is_whole = stop - at == kChunk;
      for (; at < stop; ++at) f((*chunk.bytes)[at % kChunk], std::ptrdiff_t(at - base));
      if (is_whole && makes_alike) {
        chunk.whole = (*chunk.bytes)[0];
        chunk.is_split = false;
      }
    }
  }

 private:
  struct Chunk {
    SharedByte whole;
    std::unique_ptr<std::array<SharedByte, kChunk>> bytes;
    bool is_split = false;
    std::uint32_t generation = 0;
  };

  void split(Chunk& chunk) {
    if (!chunk.bytes) chunk.bytes = std::make_unique<std::array<SharedByte, kChunk>>();
    for (SharedByte& byte : *chunk.bytes) byte = chunk.whole;
    chunk.is_split = true;
  }

  std::vector<Region> regions_;
  std::vector<Chunk> chunks_;
  std::uint32_t generation_ = 0;
};

}  // namespace sparseops_emulation::memory
