// The buffers that a test has announced as global memory. See memory_check.h.
#include "global_memory.h"

#include <map>

namespace sparseops_emulation::memory {
namespace {

std::map<const std::byte*, GlobalBuffer>& buffers() {
  static std::map<const std::byte*, GlobalBuffer> all;
  return all;
}

GlobalBuffer* latest = nullptr;  // accesses come in runs

}  // namespace

GlobalBuffer* find_global(const void* address) {
  const auto a = static_cast<const std::byte*>(address);
  if (latest && latest->range.holds(a, 1)) return latest;
  auto it = buffers().upper_bound(a);
  if (it == buffers().begin()) return nullptr;
  --it;
  if (!it->second.range.holds(a, 1)) return nullptr;
  return latest = &it->second;
}

void for_each_global(void (*f)(GlobalBuffer&)) {
  for (auto& [_, buffer] : buffers()) f(buffer);
}

void watch_global(const void* address, std::size_t bytes) {
  const auto begin = static_cast<const std::byte*>(address);
  buffers()[begin] = {{begin, begin + bytes}, {}};
}

void forget_global(const void* address) {
  buffers().erase(static_cast<const std::byte*>(address));
  latest = nullptr;
}

bool is_global(const void* address, std::size_t bytes) {
  if (buffers().empty()) return true;
  const GlobalBuffer* buffer = find_global(address);
  return buffer && buffer->range.holds(address, bytes);
}

}  // namespace sparseops_emulation::memory
