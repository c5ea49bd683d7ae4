// The n-th time that each lane of a warp comes by one line is one request, whenever it comes: on the device the lanes
// go together. Shared memory serves a request of up to 4 bytes a lane in one pass if no two lanes want different words
// of one bank; wider ones go by half or quarter warps. Global memory moves sectors of 32 bytes.
#include "traffic.h"

#include <algorithm>
#include <array>
#include <map>
#include <unordered_map>

#include "global_memory.h"
#include "source_lines.h"

namespace sparseops_emulation::memory {
namespace {

struct Request {
  std::array<std::uintptr_t, 32> address{};  // 0 for a lane that takes no part
  int lanes = 0;
};

struct Site {
  bool shared, store;
  std::size_t bytes;
  std::vector<std::uint32_t> times;                       // that each thread came by
  std::unordered_map<std::uint64_t, Request> incomplete;  // by warp and time
  std::uint64_t requests = 0, units = 0, ideal = 0;
};

std::map<std::pair<const void*, bool>, Site> sites;  // by code address; cp.async loads and stores in one
SharedMemory shared_memory;
unsigned thread_count, current;

std::size_t distinct(std::vector<std::uintptr_t>& units) {
  std::sort(units.begin(), units.end());
  units.erase(std::unique(units.begin(), units.end()), units.end());
  return units.size();
}

void add_shared(Site& site, const Request& request) {
  const std::size_t lanes_at_once = site.bytes <= 4 ? 32 : std::max<std::size_t>(1, 128 / site.bytes);
  std::vector<std::uintptr_t> all;
  for (std::size_t first = 0; first < 32; first += lanes_at_once) {
    std::vector<std::uintptr_t> words;
    for (std::size_t lane = first; lane < first + lanes_at_once; ++lane) {
      const std::uintptr_t a = request.address[lane];
      for (std::uintptr_t w = a / 4; a && w <= (a + site.bytes - 1) / 4; ++w) words.push_back(w);
    }
    distinct(words);
    std::array<unsigned, 32> of_bank{};
    for (const std::uintptr_t w : words) ++of_bank[w % 32];
    site.units += *std::max_element(of_bank.begin(), of_bank.end());
    all.insert(all.end(), words.begin(), words.end());
  }
  site.ideal += (distinct(all) + 31) / 32;
}

void add_global(Site& site, const Request& request) {
  constexpr std::uintptr_t kSector = 32;
  std::vector<std::uintptr_t> sectors, bytes;
  for (const std::uintptr_t a : request.address) {
    if (!a) continue;
    for (std::uintptr_t b = a; b < a + site.bytes; ++b) bytes.push_back(b);
    for (std::uintptr_t s = a / kSector; s <= (a + site.bytes - 1) / kSector; ++s) sectors.push_back(s);
  }
  site.units += distinct(sectors);
  site.ideal += (distinct(bytes) + kSector - 1) / kSector;
}

void add(Site& site, const Request& request) {
  ++site.requests;
  if (site.shared) {
    add_shared(site, request);
  } else {
    add_global(site, request);
  }
}

}  // namespace

void begin_traffic(unsigned threads, const SharedMemory& shared) {
  thread_count = threads;
  shared_memory = shared;
}

void traffic_of(unsigned thread) { current = thread; }

void end_traffic() {
  for (auto& [_, site] : sites) {
    for (const auto& [_, request] : site.incomplete) add(site, request);
    site.incomplete.clear();
    site.times.clear();
  }
}

void count(const void* address, std::size_t bytes, Access access, const void* site_address) {
  const auto holds = [&](const Range& range) { return range.holds(address, bytes); };
  const bool shared =
      holds(shared_memory.variables) || std::any_of(shared_memory.dynamic.begin(), shared_memory.dynamic.end(), holds);
  if (bytes == 0 || (!shared && !find_global(address))) return;
  const bool store = access == Access::write || access == Access::atomic;
  const auto [it, _] = sites.try_emplace({site_address, shared}, Site{shared, store, bytes, {}, {}});
  Site& site = it->second;
  site.times.resize(thread_count);
  const std::uint64_t key = std::uint64_t{current / 32} << 32 | site.times[current]++;
  Request& request = site.incomplete[key];
  request.address[current % 32] = reinterpret_cast<std::uintptr_t>(address);
  if (++request.lanes < 32) return;
  add(site, request);
  site.incomplete.erase(key);
}

std::vector<Traffic> take_traffic() {
  std::vector<const void*> addresses;
  for (const auto& [key, _] : sites) addresses.push_back(key.first);
  look_up(addresses);
  // unrolled and inlined copies of a line are one line
  std::map<std::tuple<std::string, bool, bool, std::size_t>, Traffic> lines;
  for (const auto& [key, site] : sites) {
    const std::string place = describe(key.first);
    Traffic& line = lines[{place, site.shared, site.store, site.bytes}];
    line.place = place;
    line.shared = site.shared;
    line.store = site.store;
    line.bytes = site.bytes;
    line.requests += site.requests;
    line.units += site.units;
    line.ideal += site.ideal;
  }
  sites.clear();
  std::vector<Traffic> traffic;
  for (auto& [_, line] : lines) traffic.push_back(std::move(line));
  return traffic;
}

}  // namespace sparseops_emulation::memory
