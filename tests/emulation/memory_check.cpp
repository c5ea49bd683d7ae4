// The race check: two accesses to one byte, one of them a write, must be ordered. Within a block barriers, mbarriers and
// __syncwarp order them; within a cluster, its barrier and mbarriers; between blocks otherwise, an address that one
// releases and the other acquires; between launches, the stream. See memory_check.h and happens_before.h. Compiled
// without -fsanitize=thread, and only in the race build.
#include "memory_check.h"

#include <map>

#include "global_memory.h"
#include "happens_before.h"
#include "shared_shadow.h"
#include "source_lines.h"
#include "traffic.h"

namespace sparseops_emulation::memory {
namespace {

bool in_blocks;
std::size_t blocks;
std::map<std::pair<const void*, const void*>, std::string> races;
SharedShadow shared_shadow;

// Where an access lies and what it is, for the report of a race.
struct Place {
  const char* memory;
  std::ptrdiff_t offset;
  const char* access;
  const void* site;
  int rank = -1;  // of the block whose shared memory it is, if that needs saying
};

void add_race(const Epoch& first, const Place& second, const std::string& what, const char* first_access) {
  constexpr std::size_t kEnough = 8;
  if (races.size() >= kEnough || races.contains({first.site, second.site})) return;
  const std::string rank = second.rank < 0 ? "" : " of rank " + std::to_string(second.rank);
  races[{first.site, second.site}] = what + " in " + second.memory + " memory" + rank + ", byte " +
                                     std::to_string(second.offset) + ":\n  " + first_access + " by " + who(first) +
                                     " at " + describe(first.site) + "\n  " + second.access + " by " +
                                     who(now(false, nullptr)) + " at " + describe(second.site) + "\n";
}

void report(const Epoch& first, const Place& second, const char* first_access) {
  add_race(first, second, is_of_another_block(first) ? "data race between blocks" : "data race", first_access);
}

const char* word(Access access) {
  switch (access) {
    case Access::write:
      return "write";
    case Access::atomic:
      return "atomic";
    default:
      return "read";
  }
}

const char* word_of_write(const Epoch& e) { return e.atomic ? "atomic" : "write"; }

void check_write(const Epoch& write, const Place& place, bool is_shared) {
  const Known k = known(write, is_shared);
  if (k == Known::no) report(write, place, word_of_write(write));
  if (k == Known::without_fence)
    add_race(write, place, "no fence.proxy.async (async proxy) between accesses", word_of_write(write));
}

void check_shared(SharedByte& byte, const Place& place, Access access) {
  if (byte.is_object) add_race(byte.write, place, "an access to an mbarrier", "mbarrier.init");
  if (byte.copy.clock) report(byte.copy, place, byte.copy.by_task ? "copy on its way" : "cp.async on its way");
  const bool both_atomic = access == Access::atomic && byte.write.atomic;
  if (!both_atomic) check_write(byte.write, place, true);
  if (access == Access::read || access == Access::read_only) {
    byte.add_read(now(false, place.site), is_known);
    return;
  }
  byte.take_reads([&](const Epoch& read) {
    if (!is_known(read)) report(read, place, "read");
  });
  byte.write = now(access == Access::atomic, place.site);
}

void check_global(GlobalByte& byte, const Place& place, Access access) {
  const bool both_atomic = access == Access::atomic && byte.write.atomic;
  if (!both_atomic) check_write(byte.write, place, false);
  if (access == Access::read_only && byte.write.clock) {
    const Place read_only{"read-only global", place.offset, "ld.global.nc", place.site};
    report(byte.write, read_only, word_of_write(byte.write));
  }
  const Epoch me = now(access == Access::atomic, place.site);
  if (access == Access::read || access == Access::read_only) {
    if (byte.read.block != me.block) byte.read_elsewhere = byte.read;
    byte.read = me;
    return;
  }
  for (Epoch* read : {&byte.read, &byte.read_elsewhere}) {
    if (!is_known(*read)) report(*read, place, "read");
    *read = {};
  }
  byte.write = me;
}

Place place_in(const SharedShadow::Region& region, std::ptrdiff_t offset, Access access, const void* site) {
  const int rank = blocks > 1 && !region.is_variables ? static_cast<int>(region.rank) : -1;
  return {"shared", offset, word(access), site, rank};
}

}  // namespace

void begin_launch() {
  forget_releases();
  for_each_global([](GlobalBuffer& buffer) { buffer.shadow.clear(); });
}

void begin_blocks(unsigned number, unsigned count, const SharedMemory& shared) {
  in_blocks = true;
  blocks = shared.dynamic.size();
  shared_shadow.begin_blocks(shared);
  begin_traffic(count * static_cast<unsigned>(blocks), shared);
  begin_knowledge(number, count, static_cast<unsigned>(blocks));
}

void end_blocks() {
  in_blocks = false;
  end_traffic();
}

void running(unsigned thread) {
  act_as(thread);
  traffic_of(thread);
}

void check(const void* address, std::size_t bytes, Access access, const void* site) {
  if (const SharedShadow::Region* region = shared_shadow.find(address, bytes)) {
    const bool is_write = access == Access::write || access == Access::atomic;
    shared_shadow.for_each(*region, address, bytes, is_write, [&](SharedByte& byte, std::ptrdiff_t offset) {
      const Place place = place_in(*region, offset, access, site);
      if (region->is_variables && blocks > 1)
        add_race(now(false, site), place, "a __shared__ variable, which a cluster's blocks have one of", "access");
      check_shared(byte, place, access);
    });
    return;
  }
  GlobalBuffer* buffer = find_global(address);
  if (!buffer || !buffer->range.holds(address, bytes)) return;
  if (buffer->shadow.empty()) buffer->shadow.resize(std::size_t(buffer->range.end - buffer->range.begin));
  const std::ptrdiff_t offset = static_cast<const std::byte*>(address) - buffer->range.begin;
  for (std::size_t i = 0; i < bytes; ++i) {
    const std::ptrdiff_t at = offset + std::ptrdiff_t(i);
    check_global(buffer->shadow[std::size_t(at)], {"global", at, word(access), site}, access);
  }
}

void begin_copy(const void* address, std::size_t bytes, const void* site) {
  check(address, bytes, Access::write, site);
  const SharedShadow::Region* region = shared_shadow.find(address, bytes);
  if (!region) return;
  shared_shadow.for_each(*region, address, bytes, true,
                         [&](SharedByte& byte, std::ptrdiff_t) { byte.copy = now(false, site); });
}

void end_copy(const void* address, std::size_t bytes, const void* site) {
  const SharedShadow::Region* region = shared_shadow.find(address, bytes);
  if (region)
    shared_shadow.for_each(*region, address, bytes, false, [](SharedByte& byte, std::ptrdiff_t) { byte.copy = {}; });
  check(address, bytes, Access::write, site);
}

void begin_object(const void* address, std::size_t bytes, const void* site) {
  check(address, bytes, Access::write, site);
  const SharedShadow::Region* region = shared_shadow.find(address, bytes);
  if (!region) return;
  shared_shadow.for_each(*region, address, bytes, false,
                         [](SharedByte& byte, std::ptrdiff_t) { byte.is_object = true; });
}

void use_object(const void* address, const void* site) {
  const SharedShadow::Region* region = shared_shadow.find(address, 1);
  if (!region) return;
  shared_shadow.for_each(*region, address, 1, false, [&](SharedByte& byte, std::ptrdiff_t offset) {
    if (!is_known(byte.write)) report(byte.write, {"shared", offset, "use of the mbarrier", site}, "mbarrier.init");
  });
}

void on_access(const void* address, std::size_t bytes, Access access, const void* site) {
  if (!in_blocks) return;
  check(address, bytes, access, site);
  count(address, bytes, access, site);
}

std::string take_races() {
  std::string text;
  for (const auto& [_, race] : races) text += race;
  races.clear();
  return text;
}

}  // namespace sparseops_emulation::memory
