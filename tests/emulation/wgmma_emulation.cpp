// wgmma.mma_async.sp and what orders it: PTX ISA 9.7.15.6, 9.7.15.7. See ptx_sm90_emulation.h.
//
// The device may read operands and write accumulators at any moment between the instruction and the wait. Here all of
// it happens at the wait, as late as is allowed. Until then the accumulators hold NaNs of a kind that arithmetic does
// not leave as they are, and every register that an instruction was given must stay as it was.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "block.h"
#include "ptx_sm90_emulation.h"
#include "wgmma_product.h"

namespace sparseops_emulation {

using memory::Access;

namespace {

constexpr unsigned kThreads = 128;               // of a warpgroup
constexpr std::uint32_t kInFlight = 0xffbadbad;  // a signalling NaN

template <class T>
using PerThread = std::array<T, kThreads>;

// A register that may have gone out of scope since: then its place still tells.
[[gnu::noinline, gnu::no_sanitize_address]] std::uint32_t peek(const std::uint32_t* r) { return *r; }

// Registers that instructions read, and what each thread had in them.
template <int count>
struct Source {
  PerThread<const std::uint32_t*> at{};
  PerThread<std::array<std::uint32_t, count>> content{};

  void set(int t, const std::uint32_t* r) {
    at[t] = r;
    std::copy(r, r + count, content[t].begin());
  }
  // The first thread where that is no longer so, or 128.
  unsigned first_changed() const {
    for (unsigned t = 0; t < kThreads; ++t)
      for (int i = 0; i < count; ++i)
        if (peek(at[t] + i) != content[t][i]) return t;
    return kThreads;
  }
};

// When registers were last waited for, in a warpgroup's own time, and how many instructions in flight use them.
struct Use {
  std::uint64_t freed = 0;
  unsigned in_flight = 0;
};

struct Accumulators : Use {
  PerThread<std::uint32_t*> at{};
  int n = 0;
  MatrixType type{};
  std::uint32_t sum[kWgmmaRows][kMostColumns];  // while in flight

  void take() {
    for (unsigned t = 0; t < kThreads; ++t)
      for (int i = 0; i < n / 2; ++i) {
        sum[row_of(t, i)][column_of(t, i)] = at[t][i];
        at[t][i] = kInFlight;
      }
  }
  void give() {
    for (unsigned t = 0; t < kThreads; ++t)
      for (int i = 0; i < n / 2; ++i) at[t][i] = sum[row_of(t, i)][column_of(t, i)];
  }
  unsigned first_changed() const {
    for (unsigned t = 0; t < kThreads; ++t)
      for (int i = 0; i < n / 2; ++i)
        if (at[t][i] != kInFlight) return t;
    return kThreads;
  }
  void add(const float (&product)[kWgmmaRows][kMostColumns], bool accumulate) {
    for (int i = 0; i < kWgmmaRows; ++i) {
      if (!accumulate) std::fill_n(sum[i], n, 0);
      for (int j = 0; j < n; ++j) {
        if (type == MatrixType::s8) {
          sum[i][j] += std::uint32_t(std::int32_t(product[i][j]));  // wraps
        } else {
          sum[i][j] = std::bit_cast<std::uint32_t>(std::bit_cast<float>(sum[i][j]) + product[i][j]);
        }
      }
    }
  }
};

// A's registers, by the place where thread 0 has them.
struct Fragments : Use {
  Source<4> at_fence;  // what they held at the last one
};

// What a thread passes.
struct Arguments {
  std::uint32_t* d;
  int n;
  MatrixType type;
  const std::uint32_t* a_registers;  // or null
  std::uint64_t a, b;
  const std::uint32_t* metadata;
  int selector;
  bool accumulate;

  bool is_as(const Arguments& o) const {
    return n == o.n && type == o.type && !a_registers == !o.a_registers && a == o.a && b == o.b &&
           selector == o.selector && accumulate == o.accumulate;
  }
};

struct Multiplication {
  const void* site = nullptr;
  Accumulators* d = nullptr;
  bool accumulate = false;
  SharedOperand a, b;
  Fragments* fragments = nullptr;  // in place of a
  Source<4> fragment;
  Source<1> metadata;
  Columns columns;
  memory::Task task;
};

// The tensor cores of one warpgroup.
struct Unit {
  unsigned first_thread = 0, race_unit = 0;
  memory::SyncClock issued;  // what those know who have come to the next instruction
  memory::SyncClock done;    // what who has waited knows
  std::uint64_t now = 0, fenced = 0, freed = 0;
  std::map<const std::uint32_t*, Accumulators> accumulators;  // by thread 0's first
  std::map<const std::uint32_t*, Fragments> fragments;
  std::vector<Multiplication> open;
  std::deque<std::vector<Multiplication>> groups;
};

struct Units {
  std::map<unsigned, Unit> of_warpgroup;  // by its first thread's number in the cluster

  Units() {
    block().when_a_thread_ends([](Thread& thread) {
      const auto& all = block().state<Units>().of_warpgroup;
      const auto it = all.find(thread.number - thread.id % kThreads);
      if (it == all.end()) return;
      const Unit& unit = it->second;
      if (!unit.open.empty()) block().fail("ends with wgmmas that it never committed");
      if (std::any_of(unit.groups.begin(), unit.groups.end(), [](const auto& group) { return !group.empty(); }))
        block().fail("ends with wgmmas that it never waited for");
    });
  }
};

Unit& my_unit() {
  Block& b = block();
  const unsigned first = b.self().number - b.self().id % kThreads;
  const auto [it, is_new] = b.state<Units>().of_warpgroup.try_emplace(first);
  if (is_new) {
    it->second.first_thread = first;
    it->second.race_unit = memory::add_unit("wgmma of the warpgroup of thread", first);
  }
  return it->second;
}

const Arguments& of(const WarpgroupLanes& threads, unsigned t) { return *static_cast<const Arguments*>(threads[t]); }

// ---- the issue

bool is_shape(int n, MatrixType type) {
  if (n < 8 || n > kMostColumns) return false;
  return type == MatrixType::s8 ? n % 16 == 0 || n == 8 || n == 24 : n % 8 == 0;
}

// The accumulators, which leave the threads' hands if they are not in flight already.
Accumulators& begin_accumulators(Unit& unit, const WarpgroupLanes& threads) {
  Block& b = block();
  const Arguments& first = of(threads, 0);
  for (const auto& [at, other] : unit.accumulators)
    if (other.in_flight && (at != first.d || other.n != first.n || other.type != first.type) &&
        at < first.d + first.n / 2 && first.d < at + other.n / 2)
      b.fail("wgmma: some of the accumulators are those of a wgmma of another shape in flight");
  const auto [it, is_new] = unit.accumulators.try_emplace(first.d);
  Accumulators& d = it->second;
  if (is_new) d.freed = unit.freed;
  if (!d.in_flight) {
    if (unit.fenced <= d.freed) b.fail("wgmma: no wgmma_fence since the accumulators were last free to change");
    d.n = first.n;
    d.type = first.type;
    for (unsigned t = 0; t < kThreads; ++t) d.at[t] = of(threads, t).d;
    d.take();
  }
  for (unsigned t = 0; t < kThreads; ++t)
    if (d.at[t] != of(threads, t).d)
      b.fail("wgmma: thread %u passes other accumulators than before", unit.first_thread + t);
  ++d.in_flight;
  return d;
}

void begin_fragments(Unit& unit, Multiplication& m, const WarpgroupLanes& threads) {
  const auto [it, is_new] = unit.fragments.try_emplace(of(threads, 0).a_registers);
  Fragments& fragments = it->second;
  if (is_new) fragments.freed = unit.freed;
  m.fragments = &fragments;
  for (unsigned t = 0; t < kThreads; ++t) m.fragment.set(t, of(threads, t).a_registers);
  if (!fragments.in_flight) {
    bool changed = unit.fenced <= fragments.freed;
    if (!is_new)  // before their first use nobody knows what they held at the fence
      for (unsigned t = 0; t < kThreads; ++t)
        changed |=
            fragments.at_fence.at[t] == m.fragment.at[t] && fragments.at_fence.content[t] != m.fragment.content[t];
    if (changed) block().fail("wgmma: no wgmma_fence since the registers of A were last free to change");
  }
  fragments.at_fence = m.fragment;
  ++fragments.in_flight;
}

void issue(Unit& unit, const WarpgroupLanes& threads, const void* site) {
  Block& b = block();
  const Arguments& first = of(threads, 0);
  for (unsigned t = 1; t < kThreads; ++t)
    if (!of(threads, t).is_as(first))
      b.fail("wgmma: threads %u and %u pass different operands", unit.first_thread, unit.first_thread + t);
  if (!unit.fenced) b.fail("wgmma: no wgmma_fence before the warpgroup's first");
  unit.open.emplace_back();
  Multiplication& m = unit.open.back();
  m.site = site;
  m.accumulate = first.accumulate;
  if (first.a_registers) {
    begin_fragments(unit, m, threads);
  } else {
    m.a = SharedOperand(first.a, kWgmmaRows, kKeptBytes, "wgmma's A");
  }
  m.b = SharedOperand(first.b, first.n, kDepthBytes, "wgmma's B");
  std::uint32_t words[kThreads];
  for (unsigned t = 0; t < kThreads; ++t) {
    words[t] = *of(threads, t).metadata;
    m.metadata.set(t, of(threads, t).metadata);
  }
  decode_metadata(words, first.type, first.selector, m.columns);
  m.d = &begin_accumulators(unit, threads);
  m.task = memory::begin_task(unit.race_unit, std::exchange(unit.issued, {}));
}

void wgmma(Arguments arguments, const void* site) {
  Block& b = block();
  b.self().site = site;
  if (!is_shape(arguments.n, arguments.type)) b.fail("wgmma: there is none of %d columns", arguments.n);
  const bool bytes = arguments.type == MatrixType::e4m3 || arguments.type == MatrixType::s8;
  if (arguments.selector < 0 || arguments.selector > (bytes ? 0 : 1))
    b.fail("wgmma: the selector is %d", arguments.selector);
  Unit& unit = my_unit();
  memory::release(unit.issued);
  b.meet_warpgroup(
      "wgmma.mma_async.sp", &arguments, [&](const WarpgroupLanes& threads) { issue(unit, threads, site); }, site);
}

// ---- the wait

void require_unchanged(const Unit& unit, unsigned thread, const char* what, const void* site) {
  if (thread == kThreads) return;
  block().self().site = site;
  block().fail("wgmma: %s of thread %u overwritten in flight", what, unit.first_thread + thread);
}

void finish(Unit& unit, Multiplication& m) {
  require_unchanged(unit, m.metadata.first_changed(), "the metadata register", m.site);
  if (m.fragments) require_unchanged(unit, m.fragment.first_changed(), "registers of A", m.site);
  require_unchanged(unit, m.d->first_changed(), "accumulators", m.site);

  static Kept kept;
  static std::byte depth[kMostColumns][kDepthBytes];
  static float product[kWgmmaRows][kMostColumns];
  const memory::Engine engine(m.task);
  const auto read = [&](const SharedOperand& from, int row, int bytes, std::byte* to) {
    for (int byte = 0; byte < bytes; byte += 16) {
      const std::byte* chunk = from.chunk(row, byte);
      memory::check(chunk, 16, Access::read, m.site);
      std::memcpy(to + byte, chunk, 16);
    }
  };
  if (m.fragments) {
    for (unsigned t = 0; t < kThreads; ++t) place_fragment(int(t), m.fragment.content[t].data(), kept);
    --m.fragments->in_flight;
    m.fragments->freed = unit.now;
  } else {
    for (int i = 0; i < kWgmmaRows; ++i) read(m.a, i, kKeptBytes, kept[i]);
  }
  for (int j = 0; j < m.d->n; ++j) read(m.b, j, kDepthBytes, depth[j]);
  multiply(m.d->type, kept, m.columns, depth, m.d->n, product);
  m.d->add(product, m.accumulate);
  memory::release(unit.done);
  // What its threads loaded for its registers was loaded before it began: who waits for it knows that all have.
  memory::join(unit.done, m.task.start);
  m.d->freed = unit.freed = unit.now;
  if (--m.d->in_flight == 0) m.d->give();
}

}  // namespace

// ---- the instructions

void wgmma_fence() {
  block().self().site = EMU_SITE;
  Unit& unit = my_unit();
  char none;
  block().meet_warpgroup(
      "wgmma.fence", &none,
      [&](const WarpgroupLanes&) {
        unit.fenced = ++unit.now;
        for (auto& [_, fragments] : unit.fragments)
          for (unsigned t = 0; t < kThreads; ++t)
            for (int i = 0; i < 4; ++i) fragments.at_fence.content[t][i] = peek(fragments.at_fence.at[t] + i);
      },
      EMU_SITE);
}

void wgmma_commit() {
  block().self().site = EMU_SITE;
  Unit& unit = my_unit();
  char none;
  block().meet_warpgroup(
      "wgmma.commit_group", &none,
      [&](const WarpgroupLanes&) {
        unit.groups.push_back(std::move(unit.open));
        unit.open.clear();
      },
      EMU_SITE);
}

void wgmma_wait(unsigned pending) {
  block().self().site = EMU_SITE;
  Unit& unit = my_unit();
  char none;
  block().meet_warpgroup(
      "wgmma.wait_group", &none,
      [&](const WarpgroupLanes&) {
        ++unit.now;
        for (; unit.groups.size() > pending; unit.groups.pop_front())
          for (Multiplication& m : unit.groups.front()) finish(unit, m);
      },
      EMU_SITE);
  memory::acquire(unit.done);
}

void wgmma_sp(void* d, int n, MatrixType type, std::uint64_t a, std::uint64_t b, const std::uint32_t& metadata,
              int selector, bool accumulate) {
  wgmma({static_cast<std::uint32_t*>(d), n, type, nullptr, a, b, &metadata, selector, accumulate}, EMU_SITE);
}

void wgmma_sp_rs(void* d, int n, MatrixType type, const std::uint32_t (&a)[4], std::uint64_t b,
                 const std::uint32_t& metadata, int selector, bool accumulate) {
  wgmma({static_cast<std::uint32_t*>(d), n, type, a, 0, b, &metadata, selector, accumulate}, EMU_SITE);
}

}  // namespace sparseops_emulation
