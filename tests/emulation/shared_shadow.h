// What the race check knows of each byte of a block's shared memory.
#pragma once
#include <memory>
#include <vector>

#include "global_memory.h"

namespace sparseops_emulation::memory {

class SharedByte {
 public:
  Epoch write;
  Epoch copy;                    // a cp.async on its way here
  std::uint32_t generation = 0;  // of the block that this tells about

  // Reads that happened before a later read need not be kept: whoever is ordered after that one is after them too.
  template <class Ordered>
  void add_read(const Epoch& read, Ordered ordered) {
    if (read_.thread == read.thread || ordered(read_)) {
      read_ = read;
      return;
    }
    if (!more_) more_ = std::make_unique<std::vector<Epoch>>();
    std::erase_if(*more_, [&](const Epoch& e) { return e.thread == read.thread || ordered(e); });
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

  void begin(std::uint32_t of_generation) {
    generation = of_generation;
    write = copy = read_ = {};
    if (more_) more_->clear();
  }

 private:
  Epoch read_;
  std::unique_ptr<std::vector<Epoch>> more_;  // where several threads read and none is ordered before the last
};

// The bytes of dynamic shared memory, then those of __shared__ variables. Kept from block to block; what is of an
// earlier block counts as nothing.
class SharedShadow {
 public:
  void begin_block(const SharedMemory& shared) {
    shared_ = shared;
    ++generation_;
    const std::size_t bytes = dynamic_bytes() + std::size_t(shared.variables.end - shared.variables.begin);
    if (bytes_.size() < bytes) bytes_ = std::vector<SharedByte>(bytes);
  }

  SharedByte* find(const void* address, std::size_t bytes) {
    if (shared_.dynamic.holds(address, bytes) || shared_.variables.holds(address, bytes))
      return &bytes_[std::size_t(offset(address))];
    return nullptr;
  }

  std::ptrdiff_t offset(const void* address) const {
    const auto a = static_cast<const std::byte*>(address);
    if (shared_.dynamic.holds(a, 1)) return a - shared_.dynamic.begin;
    return std::ptrdiff_t(dynamic_bytes()) + (a - shared_.variables.begin);
  }

  SharedByte& fresh(SharedByte& byte) const {
    if (byte.generation != generation_) byte.begin(generation_);
    return byte;
  }

 private:
  std::size_t dynamic_bytes() const { return std::size_t(shared_.dynamic.end - shared_.dynamic.begin); }

  SharedMemory shared_;
  std::vector<SharedByte> bytes_;
  std::uint32_t generation_ = 0;
};

}  // namespace sparseops_emulation::memory
