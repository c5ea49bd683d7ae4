// The race check, by vector clocks: two accesses to one byte, one of them a write, must be ordered. Within a block
// barriers and __syncwarp order them; between blocks, an address that one releases and the other acquires; between
// launches, the stream. See memory_check.h. Compiled without -fsanitize=thread, and only in the race build.
#include "memory_check.h"

#include <algorithm>
#include <map>
#include <memory>
#include <unordered_map>

#include "global_memory.h"
#include "shared_shadow.h"
#include "source_lines.h"
#include "traffic.h"

namespace sparseops_emulation::memory {
namespace {

using Clock = std::vector<std::uint32_t>;  // by thread of one block

// What is known of other blocks. Shared by all who know the same, and never changed.
using Elsewhere = std::shared_ptr<const std::map<std::uint32_t, Clock>>;

struct Knowledge {
  Clock block;  // of this thread's own block; its own entry is its time
  Elsewhere elsewhere;
  // __threadfence: what relaxed atomics may pass on, and what they brought that the next fence makes known
  Elsewhere fenced, brought;
};

std::vector<Knowledge> threads;
std::uint32_t block_number;
unsigned current;
bool in_block;
std::unordered_map<const void*, Elsewhere> released;         // by address, through acquire and release
std::unordered_map<const void*, Elsewhere> released_fenced;  // through fences and relaxed atomics
std::map<std::pair<const void*, const void*>, std::string> races;
SharedShadow shared_shadow;

void join(Clock& to, const Clock& from) {
  for (std::size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void join(Elsewhere& to, const Elsewhere& from) {
  if (!from || to == from) return;
  if (!to) {
    to = from;
    return;
  }
  auto both = std::make_shared<std::map<std::uint32_t, Clock>>(*to);
  for (const auto& [block, clock] : *from) {
    Clock& known = (*both)[block];
    known.resize(std::max(known.size(), clock.size()));
    join(known, clock);
  }
  to = std::move(both);
}

std::uint32_t& time_of(unsigned thread) { return threads[thread].block[thread]; }

// All that the running thread did and knows, as others would learn it.
Elsewhere everything_known() {
  const Knowledge& me = threads[current];
  Elsewhere all = me.elsewhere;
  join(all, std::make_shared<const std::map<std::uint32_t, Clock>>(
                std::map<std::uint32_t, Clock>{{block_number, me.block}}));
  return all;
}

// Whether the running thread knows that `e` is over.
bool ordered(const Epoch& e) {
  if (e.clock == 0) return true;
  const Knowledge& me = threads[current];
  if (e.block == block_number) return e.thread == current || me.block[e.thread] >= e.clock;
  if (!me.elsewhere) return false;
  const auto it = me.elsewhere->find(e.block);
  return it != me.elsewhere->end() && it->second[e.thread] >= e.clock;
}

std::string name_of(std::uint32_t block, unsigned thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
}

void report(const char* memory, std::ptrdiff_t offset, const char* first, const Epoch& e, const char* second,
            const void* site) {
  constexpr std::size_t kEnough = 8;
  if (races.size() >= kEnough || races.contains({e.site, site})) return;
  const char* kind = e.block == block_number ? "" : " between blocks";
  races[{e.site, site}] = "data race" + std::string(kind) + " in " + memory + " memory, byte " +
                          std::to_string(offset) + ":\n  " + first + " by " + name_of(e.block, e.thread) + " at " +
                          describe(e.site) + "\n  " + second + " by " + name_of(block_number, current) + " at " +
                          describe(site) + "\n";
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

Epoch now(Access access, const void* site) {
  return {site, time_of(current), block_number, static_cast<std::uint16_t>(current), access == Access::atomic};
}

void check_shared(SharedByte& byte, std::ptrdiff_t offset, Access access, const void* site) {
  if (byte.copy.clock) report("shared", offset, "cp.async on its way", byte.copy, word(access), site);
  const bool both_atomic = access == Access::atomic && byte.write.atomic;
  if (!both_atomic && !ordered(byte.write))
    report("shared", offset, word_of_write(byte.write), byte.write, word(access), site);
  if (access == Access::read || access == Access::read_only) {
    byte.add_read(now(access, site), ordered);
    return;
  }
  byte.take_reads([&](const Epoch& read) {
    if (!ordered(read)) report("shared", offset, "read", read, word(access), site);
  });
  byte.write = now(access, site);
}

void check_global(GlobalByte& byte, std::ptrdiff_t offset, Access access, const void* site) {
  const bool both_atomic = access == Access::atomic && byte.write.atomic;
  if (!both_atomic && !ordered(byte.write))
    report("global", offset, word_of_write(byte.write), byte.write, word(access), site);
  if (access == Access::read_only && byte.write.clock)
    report("read-only global", offset, word_of_write(byte.write), byte.write, "ld.global.nc", site);
  if (access == Access::read || access == Access::read_only) {
    if (byte.read.block != block_number) byte.read_elsewhere = byte.read;
    byte.read = now(access, site);
    return;
  }
  for (Epoch* read : {&byte.read, &byte.read_elsewhere}) {
    if (!ordered(*read)) report("global", offset, "read", *read, word(access), site);
    *read = {};
  }
  byte.write = now(access, site);
}

}  // namespace

void begin_launch() {
  released.clear();
  released_fenced.clear();
  for_each_global([](GlobalBuffer& buffer) { buffer.shadow.clear(); });
}

void begin_block(unsigned number, unsigned count, const SharedMemory& shared) {
  block_number = number;
  in_block = true;
  shared_shadow.begin_block(shared);
  begin_traffic(count, shared);
  threads.assign(count, {Clock(count), {}, {}, {}});
  for (unsigned i = 0; i < count; ++i) time_of(i) = 1;
}

void end_block() {
  in_block = false;
  end_traffic();
}

void running(unsigned thread) {
  current = thread;
  traffic_of(thread);
}

// The meeting threads' own entries are the latest times there are of them. Of others, each may know more or less.
void met() {
  Clock times(threads.size());
  Elsewhere elsewhere;
  for (unsigned i = 0; i < threads.size(); ++i) {
    times[i] = time_of(i);
    join(elsewhere, threads[i].elsewhere);
  }
  for (unsigned i = 0; i < threads.size(); ++i) {
    threads[i].block = times;
    ++time_of(i);
    threads[i].elsewhere = elsewhere;
  }
}

void met(unsigned first, std::uint32_t lanes) {
  Clock times(threads.size());
  Elsewhere elsewhere;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    join(times, threads[first + lane].block);
    join(elsewhere, threads[first + lane].elsewhere);
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    threads[first + lane].block = times;
    ++time_of(first + lane);
    threads[first + lane].elsewhere = elsewhere;
  }
}

void release(const void* address) {
  join(released[address], everything_known());
  ++time_of(current);
}

void acquire(const void* address) {
  join(threads[current].elsewhere, released[address]);
  join(threads[current].elsewhere, released_fenced[address]);
}

void fence() {
  Knowledge& me = threads[current];
  join(me.elsewhere, me.brought);
  me.fenced = everything_known();
  ++time_of(current);
}

void relaxed_atomic(const void* address) {
  Knowledge& me = threads[current];
  join(me.brought, released[address]);
  join(me.brought, released_fenced[address]);
  join(released_fenced[address], me.fenced);
}

void check(const void* address, std::size_t bytes, Access access, const void* site) {
  const auto a = static_cast<const std::byte*>(address);
  if (SharedByte* shadow = shared_shadow.find(address, bytes)) {
    const std::ptrdiff_t offset = shared_shadow.offset(address);
    for (std::size_t i = 0; i < bytes; ++i) check_shared(shared_shadow.fresh(shadow[i]), offset + i, access, site);
    return;
  }
  GlobalBuffer* buffer = find_global(address);
  if (!buffer || !buffer->range.holds(address, bytes)) return;
  if (buffer->shadow.empty()) buffer->shadow.resize(std::size_t(buffer->range.end - buffer->range.begin));
  const std::ptrdiff_t offset = a - buffer->range.begin;
  for (std::size_t i = 0; i < bytes; ++i) check_global(buffer->shadow[offset + i], offset + i, access, site);
}

void begin_copy(const void* address, std::size_t bytes, const void* site) {
  check(address, bytes, Access::write, site);
  SharedByte* shadow = shared_shadow.find(address, bytes);
  for (std::size_t i = 0; shadow && i < bytes; ++i) shadow[i].copy = now(Access::write, site);
}

void end_copy(const void* address, std::size_t bytes, const void* site) {
  SharedByte* shadow = shared_shadow.find(address, bytes);
  for (std::size_t i = 0; shadow && i < bytes; ++i) shadow[i].copy = {};
  check(address, bytes, Access::write, site);
}

void on_access(const void* address, std::size_t bytes, Access access, const void* site) {
  if (!in_block) return;
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
