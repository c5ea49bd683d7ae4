// See happens_before.h and memory_check.h.
#include "happens_before.h"

#include <unordered_map>

namespace sparseops_emulation::memory {
namespace {

struct Knowledge {
  Clock seen;              // of the running blocks; its own entry may be behind `time`
  Clock seen_fenced;       // that a fence_proxy_async lies behind, at its own entry too
  std::uint32_t time = 1;  // its own
  Elsewhere elsewhere;     // of blocks that ran before
  // __threadfence: what relaxed atomics may pass on, and what they brought that the next fence makes known
  Elsewhere fenced, brought;
};

struct Unit {
  std::string name;
  std::uint32_t time = 0;  // of its latest task
};

std::vector<Knowledge> threads;
std::vector<Unit> units;
std::uint32_t first_block;
unsigned block_size, current;
const Task* acting = nullptr;
std::unordered_map<const void*, Elsewhere> released;         // by address, through acquire and release
std::unordered_map<const void*, Elsewhere> released_fenced;  // through fences and relaxed atomics

void join(Elsewhere& to, const Elsewhere& from) {
  if (!from || to == from) return;
  if (!to) {
    to = from;
    return;
  }
  auto both = std::make_shared<std::map<std::uint32_t, Clock>>(*to);
  for (const auto& [block, clock] : *from) (*both)[block].join(clock);
  to = std::move(both);
}

// All that the running thread did and knows, as others would learn it.
Elsewhere everything_known() {
  const Knowledge& me = threads[current];
  Clock own = me.seen;
  own.set(current, me.time);
  Elsewhere all = me.elsewhere;
  join(all, std::make_shared<const std::map<std::uint32_t, Clock>>(
                std::map<std::uint32_t, Clock>{{first_block, std::move(own)}}));
  return all;
}

bool is_known_elsewhere(const Elsewhere& elsewhere, const Epoch& e) {
  if (!elsewhere) return false;
  const auto it = elsewhere->find(e.block);
  return it != elsewhere->end() && it->second[e.thread] >= e.clock;
}

std::uint16_t index_of_unit(unsigned unit) { return static_cast<std::uint16_t>(threads.size() + unit); }

}  // namespace

void begin_knowledge(unsigned block_number, unsigned count, unsigned blocks) {
  first_block = block_number;
  block_size = count;
  threads.assign(std::size_t{count} * blocks, {});
  units.clear();
  acting = nullptr;
}

void forget_releases() {
  released.clear();
  released_fenced.clear();
}

void act_as(unsigned thread) { current = thread; }

bool acts_as_task() { return acting; }

Epoch now(bool is_atomic, const void* site) {
  if (acting) return {site, acting->time, first_block, index_of_unit(acting->unit), is_atomic, true};
  return {site, threads[current].time, first_block, static_cast<std::uint16_t>(current), is_atomic, false};
}

bool is_known(const Epoch& e) {
  if (e.clock == 0) return true;
  if (!acting) {
    const Knowledge& me = threads[current];
    if (e.block != first_block) return is_known_elsewhere(me.elsewhere, e);
    return e.thread == current || me.seen[e.thread] >= e.clock;
  }
  if (e.block != first_block) return is_known_elsewhere(acting->start.elsewhere, e);
  if (e.thread == index_of_unit(acting->unit) && e.clock == acting->time) return true;
  return acting->start.seen[e.thread] >= e.clock;
}

Known known(const Epoch& write, bool is_shared) {
  if (!is_known(write)) return Known::no;
  if (!acting || write.clock == 0) return Known::yes;
  if (write.by_task || (is_shared && acting->start.seen_fenced[write.thread] >= write.clock)) return Known::yes;
  return Known::without_fence;
}

bool is_of_another_block(const Epoch& e) {
  if (e.block != first_block) return true;
  return !acting && e.thread < threads.size() && e.thread / block_size != current / block_size;
}

std::string who(const Epoch& e) {
  if (e.by_task) {
    if (e.block == first_block) return units[e.thread - threads.size()].name;
    return "the hardware beside the threads of block " + std::to_string(e.block);
  }
  return "thread " + std::to_string(e.thread % block_size) + " of block " +
         std::to_string(e.block + e.thread / block_size);
}

// ---- threads that meet

// Of themselves they bring the latest times there are.
void met(std::span<const unsigned> numbers) {
  Clock seen, fenced;
  Elsewhere elsewhere;
  const Knowledge* before = nullptr;  // mostly knows the same
  for (const unsigned i : numbers) {
    const Knowledge& thread = threads[i];
    if (!before || !thread.seen.is_same(before->seen)) seen.join(thread.seen);
    if (!before || !thread.seen_fenced.is_same(before->seen_fenced)) fenced.join(thread.seen_fenced);
    join(elsewhere, thread.elsewhere);
    before = &thread;
  }
  for (const unsigned i : numbers) seen.set(i, threads[i].time);
  for (const unsigned i : numbers) {
    Knowledge& thread = threads[i];
    thread.seen = seen;
    thread.seen_fenced = fenced;
    thread.elsewhere = elsewhere;
    ++thread.time;
  }
}

void met(unsigned first, std::uint32_t lanes) {
  unsigned numbers[32], count = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) numbers[count++] = first + lane;
  met({numbers, count});
}

// ---- addresses that are released and acquired

void release(const void* address) {
  join(released[address], everything_known());
  ++threads[current].time;
}

void acquire(const void* address) {
  join(threads[current].elsewhere, released[address]);
  join(threads[current].elsewhere, released_fenced[address]);
}

void fence() {
  Knowledge& me = threads[current];
  join(me.elsewhere, me.brought);
  me.fenced = everything_known();
  ++me.time;
}

void relaxed_atomic(const void* address) {
  Knowledge& me = threads[current];
  join(me.brought, released[address]);
  join(me.brought, released_fenced[address]);
  join(released_fenced[address], me.fenced);
}

// ---- clocks that are handed on

void release(SyncClock& clock) {
  if (acting) {
    clock.seen.set(index_of_unit(acting->unit), acting->time);
    return;
  }
  Knowledge& me = threads[current];
  if (!clock.joined_last.is_same(me.seen)) {
    clock.seen.join(me.seen);
    clock.joined_last = me.seen;
  }
  clock.seen.set(current, me.time);
  clock.seen_fenced.join(me.seen_fenced);
  join(clock.elsewhere, me.elsewhere);
  ++me.time;
}

namespace {

// Joins clocks. Many threads that know the same acquire the same, one after another.
struct Joining {
  Clock to, from, result;

  void operator()(Clock& clock, const Clock& with) {
    if (!clock.is_same(to) || !with.is_same(from)) {
      to = result = clock;
      from = with;
      result.join(with);
    }
    clock = result;
  }
};

}  // namespace

void acquire(const SyncClock& clock) {
  Knowledge& me = threads[current];
  static Joining join_seen, join_fenced;
  join_seen(me.seen, clock.seen);
  join_fenced(me.seen_fenced, clock.seen_fenced);
  join(me.elsewhere, clock.elsewhere);
}

void join(SyncClock& to, const SyncClock& from) {
  if (!to.joined_last.is_same(from.seen)) {
    to.seen.join(from.seen);
    to.joined_last = from.seen;
  }
  to.seen_fenced.join(from.seen_fenced);
  join(to.elsewhere, from.elsewhere);
}

// ---- the async proxy

void fence_proxy_async() {
  Knowledge& me = threads[current];
  me.seen_fenced.join(me.seen);
  me.seen_fenced.set(current, me.time);
  ++me.time;
}

unsigned add_unit(const char* name, unsigned number) {
  units.push_back({name + (" " + std::to_string(number)), 0});
  return static_cast<unsigned>(units.size() - 1);
}

Task begin_task(unsigned unit, SyncClock start) { return {unit, ++units[unit].time, std::move(start)}; }

Task begin_task(unsigned unit) {
  SyncClock start;
  release(start);
  return begin_task(unit, std::move(start));
}

Engine::Engine(const Task& task) { acting = &task; }
Engine::~Engine() { acting = nullptr; }

}  // namespace sparseops_emulation::memory
