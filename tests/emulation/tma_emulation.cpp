// The copies of the copy engine, with and without a tensor map: PTX ISA 9.7.9.25, 9.7.9.27. See ptx_sm90_emulation.h.
//
// A load may write at any moment between its issue and the end of its mbarrier's phase, a store may read until its
// group was waited for. Here both do it as late as the emulator's background lets them, and a load's destination is
// spoiled at once: whoever is too early finds NaNs.
#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "block.h"
#include "mbarrier.h"
#include "ptx_sm90_emulation.h"
#include "shared_memory.h"
#include "tensor_map.h"

namespace sparseops_emulation {

using memory::Access;

namespace {

// The map at `opaque`.
TensorMap map_at(const CUtensorMap* opaque, const char* what) {
  Block& b = block();
  const void* address = opaque;
  TensorMap map;
  if (reinterpret_cast<std::uintptr_t>(address) % 64)
    b.fail("%s: the address of the tensor map, %p, is no multiple of 64", what, address);
  std::memcpy(static_cast<void*>(&map), address, sizeof map);
  if (map.mark != TensorMap::kMark) b.fail("%s: no tensor map was encoded at %p", what, address);
  return map;
}

// The same, if a copy of this kind may use it.
TensorMap map_for(const CUtensorMap* opaque, TensorMap::Mode mode, int rank, const char* what) {
  const TensorMap map = map_at(opaque, what);
  if (map.mode != mode)
    block().fail("%s: the tensor map is of the other mode, %s", what,
                 mode == TensorMap::Mode::tile ? "im2col" : "tiled");
  if (map.rank != rank) block().fail("%s: %d coordinates for a tensor map of rank %d", what, rank, int(map.rank));
  return map;
}

// What the rows of a box lie between in global memory must be one buffer.
class Extent {
 public:
  void add(const BoxRow& row) {
    if (!row.bytes) return;
    begin_ = begin_ ? std::min(begin_, row.global) : row.global;
    end_ = std::max(end_, row.global + row.bytes);
  }
  void require(const char* what) const {
    if (begin_) require_global(begin_, std::size_t(end_ - begin_), 1, what);
  }

 private:
  std::byte *begin_ = nullptr, *end_ = nullptr;
};

// ---- loads

struct Load {
  const char* what;
  const void* site;
  std::uint32_t dst, bytes, alignment, bar;
  std::uint16_t multicast;
};

// Begins a load into each block that it is for: `check_source()` tells the race check what is read, and later
// `deliver(to)` brings it to the bytes from `to` on.
template <class CheckSource, class Deliver>
void begin(const Load& load, CheckSource check_source, Deliver deliver) {
  Block& b = block();
  const unsigned ranks = load.multicast ? load.multicast : 1u << b.self().rank;
  for (unsigned rank = 0; ranks >> rank; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    std::byte* to = shared_pointer(load.dst, load.bytes, load.alignment, load.what, rank);
    const memory::Task task = memory::begin_task(mbarrier_for_copy(load.bar, rank, load.what));
    {
      const memory::Engine engine(task);
      check_source();
      memory::begin_copy(to, load.bytes, load.site);
    }
    std::memset(to, 0xff, load.bytes);
    b.in_background({load.what, load.site, rank, [=] {
                       const memory::Engine engine(task);
                       memory::end_copy(to, load.bytes, load.site);
                       deliver(to);
                       mbarrier_complete_tx(load.bar, rank, load.bytes);
                     }});
  }
}

// The same by a tensor map, of whose rows `walk(f)` tells f.
template <class Walk>
void begin(const char* what, const void* site, const TensorMap& map, std::uint32_t dst, std::uint32_t bar,
           std::uint16_t multicast, Walk walk) {
  Extent extent;
  walk([&](const BoxRow& row) { extent.add(row); });
  extent.require(what);
  begin(
      {what, site, dst, map.bytes(), map.alignment(), bar, multicast},
      [&] { walk([&](const BoxRow& row) { memory::check(row.global, row.bytes, Access::read, site); }); },
      [=](std::byte* to) {
        walk([&](const BoxRow& row) {
          std::byte content[256 * 8] = {};
          std::memcpy(content + row.first, row.global, row.bytes);
          for (std::uint32_t i = 0; i < map.row_bytes(); i += 16)
            std::memcpy(to + (map.address(dst, row.index, i) - dst), content + i, 16);
        });
      });
}

}  // namespace

void prefetch_tensormap(const CUtensorMap* map) {
  block().self().site = EMU_SITE;
  map_at(map, "prefetch.tensormap");
}

void bulk_load(std::uint32_t dst, const void* src, std::uint32_t bytes, std::uint32_t bar) {
  constexpr auto kName = "bulk load";
  const void* site = EMU_SITE;
  block().self().site = site;
  if (bytes % 16 || !bytes) block().fail("%s: %u bytes, which are no multiple of 16", kName, bytes);
  require_global(src, bytes, 16, kName);
  begin(
      {kName, site, dst, bytes, 16, bar, 0}, [=] { memory::check(src, bytes, Access::read, site); },
      [=](std::byte* to) { std::memcpy(to, src, bytes); });
}

void tma_load(std::uint32_t dst, const CUtensorMap* opaque, std::uint32_t bar, const int* at, int rank,
              std::uint16_t multicast) {
  constexpr auto kName = "TMA load";
  block().self().site = EMU_SITE;
  const TensorMap map = map_for(opaque, TensorMap::Mode::tile, rank, kName);
  std::array<int, TensorMap::kMaxRank> from{};
  std::copy(at, at + rank, from.begin());
  begin(kName, EMU_SITE, map, dst, bar, multicast, [=](auto f) { map.for_each_row(from.data(), f); });
}

void tma_load_im2col(std::uint32_t dst, const CUtensorMap* opaque, std::uint32_t bar, const int (&at)[4],
                     std::uint16_t offset_w, std::uint16_t offset_h, std::uint16_t multicast) {
  constexpr auto kName = "TMA im2col load";
  Block& b = block();
  b.self().site = EMU_SITE;
  const TensorMap map = map_for(opaque, TensorMap::Mode::im2col, 4, kName);
  if (offset_w > 255 || offset_h > 255) b.fail("%s: offsets %u, %u, of 8 bits", kName, offset_w, offset_h);
  for (int i = 0; i < 2; ++i) {
    const int c = at[i + 1];
    if (c < map.lower[i] || c >= map.end(i))
      b.fail("%s: %s is %d, outside the corners %d and %d", kName, i ? "h" : "w", c, int(map.lower[i]),
             int(map.end(i)) - 1);
    if ((c - map.lower[i]) % map.step[i + 1])
      b.fail("%s: %s is %d, which steps of %d from %d do not meet: not emulated", kName, i ? "h" : "w", c,
             int(map.step[i + 1]), int(map.lower[i]));
  }
  std::array<int, 4> from;
  std::copy(at, at + 4, from.begin());
  begin(kName, EMU_SITE, map, dst, bar, multicast,
        [=](auto f) { map.for_each_pixel({from[0], from[1], from[2], from[3]}, offset_w, offset_h, f); });
}

// ---- stores

namespace {

// A box on its way to global memory. Its work is done in two parts, each at its own time.
struct Store {
  TensorMap map;
  std::array<int, TensorMap::kMaxRank> at;
  std::uint32_t src;
  const std::byte* from;
  const void* site;
  memory::Task reading, writing;
  memory::SyncClock read, written;  // what a thread that waited for it knows
  std::vector<std::byte> content;
  std::uint64_t read_work, write_work;

  void do_read() {
    if (!content.empty()) return;
    const memory::Engine engine(reading);
    content.assign(from, from + map.bytes());
    memory::release(read);
  }
  void do_write() {
    do_read();
    const memory::Engine engine(writing);
    map.for_each_row(at.data(), [&](const BoxRow& row) {
      memory::check(row.global, row.bytes, Access::write, site);
      for (std::uint32_t i = 0; i < row.bytes; ++i)
        row.global[i] = content[map.address(src, row.index, row.first + i) - src];
    });
    memory::release(written);
  }
};

struct StoresOfThread {
  struct Group {
    std::vector<std::shared_ptr<Store>> stores;
    bool was_read = false;  // and its thread waited for that
  };
  std::vector<std::shared_ptr<Store>> open;
  std::deque<Group> groups;
  unsigned reading_unit = 0, writing_unit = 0;
};

struct Stores {
  std::map<unsigned, StoresOfThread> of_thread;  // by its number in the cluster

  Stores() {
    block().when_a_thread_ends([](Thread& thread) {
      const auto& all = block().state<Stores>().of_thread;
      const auto it = all.find(thread.number);
      if (it == all.end()) return;
      const auto unread = [](const auto& group) { return !group.was_read && !group.stores.empty(); };
      if (!it->second.open.empty()) block().fail("ends with bulk stores that it never committed");
      if (std::any_of(it->second.groups.begin(), it->second.groups.end(), unread))
        block().fail("ends with bulk stores that may not yet have read its block's shared memory");
    });
  }
};

StoresOfThread& my_stores() { return block().state<Stores>().of_thread[block().self().number]; }

}  // namespace

void tma_store(const CUtensorMap* opaque, std::uint32_t src, const int* at, int rank) {
  constexpr auto kName = "TMA store";
  const void* site = EMU_SITE;
  Block& b = block();
  b.self().site = site;
  const TensorMap map = map_for(opaque, TensorMap::Mode::tile, rank, kName);
  for (int d = 0; d < rank; ++d)
    if (at[d] < 0) b.fail("%s: coordinate %d is %d, which only a load may begin at", kName, d, at[d]);
  const std::byte* from = shared_pointer(src, map.bytes(), map.alignment(), kName);
  Extent extent;
  map.for_each_row(at, [&](const BoxRow& row) { extent.add(row); });
  extent.require(kName);

  StoresOfThread& mine = my_stores();
  if (!mine.reading_unit) {
    mine.reading_unit = memory::add_unit("TMA store's reading for thread", b.self().number);
    mine.writing_unit = memory::add_unit("TMA store's writing for thread", b.self().number);
  }
  const auto store = std::make_shared<Store>();
  mine.open.push_back(store);
  store->map = map;
  std::copy(at, at + rank, store->at.begin());
  store->src = src;
  store->from = from;
  store->site = site;
  store->reading = memory::begin_task(mine.reading_unit);
  store->writing = memory::begin_task(mine.writing_unit);
  {
    const memory::Engine engine(store->reading);
    memory::check(from, map.bytes(), Access::read, site);
  }
  store->read_work = b.in_background({kName, site, b.self().rank, [store] { store->do_read(); }});
  store->write_work = b.in_background({kName, site, b.self().rank, [store] { store->do_write(); }, true});
}

void bulk_commit() {
  StoresOfThread& mine = my_stores();
  mine.groups.push_back({std::move(mine.open)});
  mine.open.clear();
}

void bulk_wait_read(unsigned pending) {
  auto& groups = my_stores().groups;
  for (std::size_t i = 0; i + pending < groups.size(); ++i) {
    for (const auto& store : groups[i].stores) {
      block().finish(store->read_work);
      memory::acquire(store->read);
    }
    groups[i].was_read = true;
  }
}

void bulk_wait(unsigned pending) {
  bulk_wait_read(pending);
  for (auto& groups = my_stores().groups; groups.size() > pending; groups.pop_front()) {
    for (const auto& store : groups.front().stores) {
      block().finish(store->write_work);
      memory::acquire(store->written);
    }
  }
}

}  // namespace sparseops_emulation
